// Sum of squares in a fixed order: the same double for any number of threads and any instruction set. Squares of bf16
// and fp32 are exact in double, so that a fused multiply-add would give the same. kernels/host/native.py holds the reference in
// torch. Reads 2 or 4 bytes an element.
#pragma once

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kLanes = 16;  // independent sums: two AVX-512, four AVX2 or eight SSE registers of doubles

template <typename Scalar>
double chunk_sum(const Scalar *x  // (kChunk,)
) {
    double lanes[kLanes] = {};
    for (size_t row = 0; row < kChunk; row += kLanes) {
        for (size_t lane = 0; lane < kLanes; ++lane) {
            const double value = widened(x[row + lane]);
            lanes[lane] += value * value;
        }
    }
    for (size_t width = kLanes / 2; width > 0; width /= 2) {
        for (size_t lane = 0; lane < width; ++lane) lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
    }
    return lanes[0];
}

template <typename Scalar>
void chunk_sums_of(const Scalar *x, size_t count, double *sums, size_t first, size_t last) {
    for (size_t chunk = first; chunk < last; ++chunk) {
        const size_t begin = chunk * kChunk;
        if (count - begin >= kChunk) {
            sums[chunk] = chunk_sum(x + begin);
        } else {
            Scalar tail[kChunk] = {};  // zeros add nothing
            std::memcpy(tail, x + begin, (count - begin) * sizeof(Scalar));
            sums[chunk] = chunk_sum(tail);
        }
    }
}

void chunk_sums(Floats x,      // (count,)
                size_t count,
                double *sums,  // (ceil(count / kChunk),)
                size_t first, size_t last) {
    if (x.bf16) {
        chunk_sums_of(x.half(), count, sums, first, last);
    } else {
        chunk_sums_of(x.fp32(), count, sums, first, last);
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
