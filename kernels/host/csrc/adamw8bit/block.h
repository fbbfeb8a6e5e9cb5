// Where the elements of a block are, whole blocks and the short one at the end of a run alike.
#pragma once

#include <cstring>

#include "kernels.h"

namespace leapalign::LEAPALIGN_ISA {

// Where the 256 elements of a block are: in the run's memory, or, where the run ends within the block, in a copy.
struct Block {
    Floats weights, gradient, ema;
    uint8_t *codes_m, *codes_v;
    int8_t *residual;
    float *master;
};

LEAPALIGN_INLINE Floats at(Floats x, size_t index) {
    if (!x) return x;
    return {x.bf16 ? static_cast<void *>(x.half() + index) : x.fp32() + index, x.bf16};
}

LEAPALIGN_INLINE size_t width_of(Floats x) { return x.bf16 ? sizeof(uint16_t) : sizeof(float); }

// The last block of a run, filled up with its first element: then the largest of the whole is that of the run's, also
// where a state is infinite, of which a zero's would be nan.
struct Copy {
    alignas(64) float weights[kBlock], gradient[kBlock], ema[kBlock], master[kBlock];
    alignas(64) uint8_t codes_m[kBlock], codes_v[kBlock];
    alignas(64) int8_t residual[kBlock];

    template <typename Scalar>
    static void fill(Scalar *to, const Scalar *from, size_t length) {
        std::memcpy(to, from, length * sizeof(Scalar));
        for (size_t i = length; i < kBlock; ++i) to[i] = to[0];
    }

    static Floats fill(float *to, Floats from, size_t length) {
        if (from && from.bf16) fill(reinterpret_cast<uint16_t *>(to), from.half(), length);
        if (from && !from.bf16) fill(to, from.fp32(), length);
        return {from ? to : nullptr, from.bf16};
    }

    Block fill(const Block &block, size_t length) {
        fill(codes_m, block.codes_m, length);
        fill(codes_v, block.codes_v, length);
        if (block.residual) fill(residual, block.residual, length);
        if (block.master) fill(master, block.master, length);
        return {fill(weights, block.weights, length), fill(gradient, block.gradient, length), fill(ema, block.ema, length),
                codes_m, codes_v, block.residual ? residual : nullptr, block.master ? master : nullptr};
    }

    void write_back(const Block &block, size_t length) const {
        std::memcpy(block.weights.data, weights, length * width_of(block.weights));
        if (block.ema) std::memcpy(block.ema.data, ema, length * width_of(block.ema));
        if (block.master) std::memcpy(block.master, master, length * sizeof(float));
        std::memcpy(block.codes_m, codes_m, length);
        std::memcpy(block.codes_v, codes_v, length);
        if (block.residual) std::memcpy(block.residual, residual, length);
    }
};

Block block_of(const Run &run, size_t block) {
    const size_t begin = block * kBlock;
    return {at(run.weights, begin), at(run.gradient, begin), at(run.ema, begin), run.codes_m + begin, run.codes_v + begin,
            run.residual ? run.residual + begin : nullptr, run.master ? run.master + begin : nullptr};
}

LEAPALIGN_INLINE void fetch(const void *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) LEAPALIGN_FETCH(static_cast<const char *>(from) + i);
}

// Asks for a block two steps before it is due: memory answers within the time of one, and what the processor fetches by
// itself ends with each page.
LEAPALIGN_NOINLINE void fetch(const Run &run, size_t block) {
    const size_t begin = block * kBlock;
    const Floats weights = at(run.weights, begin), gradient = at(run.gradient, begin);
    if (!run.master) fetch(weights.data, kBlock * width_of(weights));
    if (gradient) fetch(gradient.data, kBlock * width_of(gradient));
    fetch(run.codes_m + begin, kBlock);
    fetch(run.codes_v + begin, kBlock);
}

LEAPALIGN_INLINE size_t length_of(const Run &run, size_t block) {
    const size_t left = run.count - block * kBlock;
    return left < kBlock ? left : kBlock;
}

}  // namespace leapalign::LEAPALIGN_ISA
