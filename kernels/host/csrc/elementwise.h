// Casts, gradient accumulation and averages, an element at a time; the compiler vectorises them.
#pragma once

#include "kernels.h"

namespace leapalign::LEAPALIGN_ISA {

LEAPALIGN_INLINE float widened(uint16_t bf16) { return float_of(uint32_t{bf16} << 16); }
LEAPALIGN_INLINE float widened(float value) { return value; }

// To nearest, ties to even; nan becomes quiet.
LEAPALIGN_INLINE uint16_t rounded_to_nearest(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : nearest);
}

// rounding.round_with_draws. Away from zero in exactly (low 16 bits) of the 65,536 draws; nan stays nan, inf stays inf,
// finite stays finite.
LEAPALIGN_INLINE uint16_t rounded_with_draw(float value, uint16_t draw) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
    const uint32_t limit = magnitude == 0x7F800000u ? 0x7F80u : 0x7F7Fu;
    uint32_t rounded = (magnitude + draw) >> 16;
    rounded = rounded < limit ? rounded : limit;
    rounded = magnitude > 0x7F800000u ? (magnitude >> 16) | 0x40u : rounded;
    return static_cast<uint16_t>(sign | rounded);
}

// adamw8bit.join_residual and split_residual.
LEAPALIGN_INLINE float joined(uint16_t high, int8_t low) {
    const uint32_t magnitude = (static_cast<uint32_t>(high & 0x7FFFu) << 8) + static_cast<uint32_t>(int32_t{low});
    return float_of((magnitude << 8) | (static_cast<uint32_t>(high & 0x8000u) << 16));
}

LEAPALIGN_INLINE void split(float value, uint16_t &weight, int8_t &residual) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    uint32_t nearest = (magnitude + 0x7Fu + ((magnitude >> 8) & 1u)) >> 8;
    nearest = nearest < 0x7F7F7Fu ? nearest : 0x7F7F7Fu;
    const uint32_t high = (nearest + 0x80u) >> 8;
    const bool finite = magnitude < 0x7F800000u;
    const uint32_t special = (magnitude >> 16) | (magnitude > 0x7F800000u ? 0x40u : 0u);
    weight = static_cast<uint16_t>((finite ? high : special) | ((bits >> 16) & 0x8000u));
    residual = static_cast<int8_t>(finite ? nearest - (high << 8) : 0u);
}

template <typename Scalar>
bool all_finite(const Scalar *x, size_t count) {
    constexpr size_t kStep = 4096;  // between looks: the loop inside has no branch
    for (size_t begin = 0; begin < count; begin += kStep) {
        const size_t length = count - begin < kStep ? count - begin : kStep;
        uint32_t largest = 0;
        for (size_t i = 0; i < length; ++i) {
            const uint32_t magnitude = bits_of(widened(x[begin + i])) & 0x7FFFFFFFu;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest >= 0x7F800000u) return false;
    }
    return true;
}

bool finite(Floats x, size_t begin, size_t end) {
    return x.bf16 ? all_finite(x.half() + begin, end - begin) : all_finite(x.fp32() + begin, end - begin);
}

template <typename Scalar>
void accumulate_into(uint16_t *LEAPALIGN_RESTRICT sum, const Scalar *LEAPALIGN_RESTRICT x, size_t count) {
    for (size_t i = 0; i < count; ++i) sum[i] = rounded_to_nearest(widened(sum[i]) + widened(x[i]));
}

template <typename Scalar>
void accumulate_into(float *LEAPALIGN_RESTRICT sum, const Scalar *LEAPALIGN_RESTRICT x, size_t count) {
    for (size_t i = 0; i < count; ++i) sum[i] += widened(x[i]);
}

void accumulate(Floats sum, Floats x, size_t begin, size_t end) {
    const size_t count = end - begin;
    if (sum.bf16) {
        x.bf16 ? accumulate_into(sum.half() + begin, x.half() + begin, count)
               : accumulate_into(sum.half() + begin, x.fp32() + begin, count);
    } else {
        x.bf16 ? accumulate_into(sum.fp32() + begin, x.half() + begin, count)
               : accumulate_into(sum.fp32() + begin, x.fp32() + begin, count);
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
