// Stochastic rounding of fp32 to bf16 with counter-based random bits. kernels/rounding.py holds the definition and the
// reference in torch; both give the same bits. Reads 4 bytes and writes 2 for each element.
#pragma once

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kDrawsPerCounter = 8;

// Calls work(draws, from, to) with the draws of elements from ... to of [begin, end), in blocks of 256. `offset` is that
// of element 0.
template <typename Work>
LEAPALIGN_INLINE void with_draws(uint64_t offset, const Stream &stream, size_t begin, size_t end, const Work &work) {
    alignas(64) uint16_t draws[kBlock];
    for (size_t from = begin; from < end;) {
        const uint64_t element = offset + from;
        const size_t skipped = static_cast<size_t>(element % kBlock);
        const size_t length = end - from < kBlock - skipped ? end - from : kBlock - skipped;
        draw_block(stream, (element - skipped) / kDrawsPerCounter, draws);
        work(draws + skipped, from, from + length);
        from += length;
    }
}

void round_stochastic(const float *x,  // (count,)
                      uint16_t *out,   // (count,) bf16
                      uint64_t offset, Stream stream, size_t begin, size_t end) {
    with_draws(offset, stream, begin, end, [=](const uint16_t *draws, size_t from, size_t to) {
        for (size_t i = from; i < to; ++i) out[i] = rounded_with_draw(x[i], draws[i - from]);
    });
}

// average + (weights - average) * gain.
LEAPALIGN_INLINE float averaged(float average, float weight, float gain) { return average + (weight - average) * gain; }

template <typename Weight>
void ema_of(Floats average, const Weight *weights, float gain, uint64_t offset, Stream stream, size_t begin, size_t end) {
    if (average.bf16) {
        uint16_t *to = average.half();
        with_draws(offset, stream, begin, end, [=](const uint16_t *draws, size_t first, size_t last) {
            for (size_t i = first; i < last; ++i) {
                to[i] = rounded_with_draw(averaged(widened(to[i]), widened(weights[i]), gain), draws[i - first]);
            }
        });
    } else {
        float *to = average.fp32();
        for (size_t i = begin; i < end; ++i) to[i] = averaged(to[i], widened(weights[i]), gain);
    }
}

void ema(Floats average,  // (count,)
         Floats weights,  // (count,)
         float gain, uint64_t offset, Stream stream, size_t begin, size_t end) {
    if (weights.bf16) {
        ema_of(average, weights.half(), gain, offset, stream, begin, end);
    } else {
        ema_of(average, weights.fp32(), gain, offset, stream, begin, end);
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
