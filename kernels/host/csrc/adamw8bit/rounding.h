// Stochastic rounding of fp32 to bf16 with counter-based random bits. kernels/rounding.py holds the definition and the
// reference in torch; both give the same bits. Reads 4 bytes and writes 2 for each element.
#pragma once

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

LEAPALIGN_NOINLINE void draw_block(const Draws &philox, uint64_t first,  // a multiple of 32
                                   uint16_t *draws                       // (256,)
) {
    for (size_t i = 0; i < kBlock; i += kDrawn) {
        draw_group(philox, static_cast<uint32_t>(first) + static_cast<uint32_t>(i / kDrawsPerCounter), draws + i);
    }
}

// A group whose order is that of its vectors.
LEAPALIGN_NOINLINE void store_carefully(uint16_t *to, const float *x, const uint16_t *draws) {
    for (size_t i = 0; i < kGroup; ++i) to[element_of(i)] = rounded_with_draw(x[i], draws[element_of(i)]);
}

LEAPALIGN_INLINE void store_stochastic(uint16_t *to, const Vector (&x)[4], const uint16_t *draws) {
    if (any_huge(x)) {  // may saturate, or is not finite
        alignas(64) float values[kGroup];
        for (size_t i = 0; i < 4; ++i) store(values + kWidth * i, x[i]);
        return store_carefully(to, values, draws);
    }
    for (size_t i = 0; i < 4; i += 2) store_rounded(to + kWidth * i, {x[i], x[i + 1]}, draws + kWidth * i);
}

// Calls work(draws, from, to) with the draws of elements from ... to of [begin, end), in blocks of 256. `offset` is that
// of element 0.
template <typename Work>
LEAPALIGN_INLINE void with_draws(uint64_t offset, const Stream &stream, size_t begin, size_t end, const Work &work) {
    alignas(64) uint16_t draws[kBlock];
    Draws philox(stream, (offset + begin) / kDrawsPerCounter >> 32);
    for (size_t from = begin; from < end;) {
        const uint64_t element = offset + from;
        const size_t skipped = static_cast<size_t>(element % kBlock);
        const size_t length = end - from < kBlock - skipped ? end - from : kBlock - skipped;
        const uint64_t first = (element - skipped) / kDrawsPerCounter;
        if (philox.high != first >> 32) philox = Draws(stream, first >> 32);
        draw_block(philox, first, draws);
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
