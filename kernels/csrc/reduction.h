// Sum of squares of bf16 in a fixed order: the same double for any number of threads and any instruction set.
// kernels/host.py holds the reference in torch. Reads 2 bytes for each element.
#pragma once

#include "portable.h"

namespace leapalign {

constexpr size_t kLanes = 16;       // independent sums: two AVX-512, four AVX2 or eight SSE registers of doubles
constexpr size_t kChunk = 4096;     // elements that one partial sum covers: 256 additions in each lane

// The square of a bf16 has 16 significant bits and an exponent within 2^-266 .. 2^256: exact in double, so that a fused
// multiply-add gives the same result as a product and a sum.
LEAPALIGN_INLINE double chunk_sum(const uint16_t *x  // (kChunk,) bf16
) {
    double lanes[kLanes] = {};
    for (size_t row = 0; row < kChunk; row += kLanes) {
        for (size_t lane = 0; lane < kLanes; ++lane) {
            const double value = float_of(uint32_t{x[row + lane]} << 16);
            lanes[lane] += value * value;
        }
    }
    for (size_t width = kLanes / 2; width > 0; width /= 2) {
        for (size_t lane = 0; lane < width; ++lane) lanes[lane] = lanes[2 * lane] + lanes[2 * lane + 1];
    }
    return lanes[0];
}

LEAPALIGN_CLONES
inline void chunk_sums(const uint16_t *x,   // (count,) bf16
                       size_t count,
                       double *sums,        // (ceil(count / kChunk),)
                       size_t first, size_t last) {
    for (size_t chunk = first; chunk < last; ++chunk) {
        const size_t begin = chunk * kChunk;
        if (count - begin >= kChunk) {
            sums[chunk] = chunk_sum(x + begin);
        } else {
            uint16_t tail[kChunk] = {};  // zeros add nothing
            std::memcpy(tail, x + begin, (count - begin) * sizeof(uint16_t));
            sums[chunk] = chunk_sum(tail);
        }
    }
}

inline double sum_of_squares(const uint16_t *x, size_t count, size_t threads) {
    size_t width = (count + kChunk - 1) / kChunk;
    if (width == 0) return 0.0;
    std::vector<double> sums(width);
    parallel_for(width, threads, 64, [&](size_t first, size_t last) { chunk_sums(x, count, sums.data(), first, last); });
    while (width > 1) {  // neighbours, then neighbours of the results: the rounding error grows with log2(chunks)
        const size_t half = width / 2;
        for (size_t i = 0; i < half; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
        if (width % 2) sums[half] = sums[width - 1];
        width = half + width % 2;
    }
    return sums[0];
}

}  // namespace leapalign
