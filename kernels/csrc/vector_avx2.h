// Eight elements at a time: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kWidth = 8;
using Vector = __m256;

LEAPALIGN_INLINE __m256i bits(Vector x) { return _mm256_castps_si256(x); }
LEAPALIGN_INLINE Vector spread(float value) { return _mm256_set1_ps(value); }
LEAPALIGN_INLINE Vector load(const float *from) { return _mm256_loadu_ps(from); }
LEAPALIGN_INLINE Vector load(const uint16_t *from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
LEAPALIGN_INLINE void store(float *to, Vector x) { _mm256_storeu_ps(to, x); }
LEAPALIGN_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
LEAPALIGN_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
LEAPALIGN_INLINE Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
LEAPALIGN_INLINE Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
LEAPALIGN_INLINE Vector root_of(Vector a) { return _mm256_sqrt_ps(a); }
LEAPALIGN_INLINE Vector least(Vector a, Vector b) { return _mm256_min_ps(a, b); }
LEAPALIGN_INLINE bool any_below(Vector a, float limit) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_set1_ps(limit), _CMP_LT_OQ)) != 0;
}

LEAPALIGN_INLINE void store_stochastic(uint16_t *to, Vector x, const uint16_t *draws) {
    const __m256i magnitude = _mm256_and_si256(bits(x), _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i large = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F7EFFFF));
    if (_mm256_movemask_epi8(large)) {  // may saturate, or is not finite
        alignas(32) float values[kWidth];
        _mm256_store_ps(values, x);
        for (size_t i = 0; i < kWidth; ++i) to[i] = rounded_with_draw(values[i], draws[i]);
        return;
    }
    const __m256i draw = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(draws)));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits(x), draw), 16);
    const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), _mm_packus_epi32(low, high));
}

// The largest |x| by its bits, in which nan is above infinity: vmaxps would lose it.
struct Peak {
    __m256i doubled = _mm256_setzero_si256();
    LEAPALIGN_METHOD void include(Vector x) {
        doubled = _mm256_max_epu32(doubled, _mm256_add_epi32(bits(x), bits(x)));
    }
    LEAPALIGN_METHOD uint32_t all() const {
        __m128i two = _mm_max_epu32(_mm256_castsi256_si128(doubled), _mm256_extracti128_si256(doubled, 1));
        two = _mm_max_epu32(two, _mm_shuffle_epi32(two, 0x4E));
        two = _mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(two)) >> 1;
    }
};

template <bool kSigned>
struct Decoder {
    const float *values;
    explicit Decoder(const Map &map) : values(map.values) {}

    // kWidth codes to the values of the map. By the load units: with eight entries a permutation, lines take longer.
    LEAPALIGN_METHOD void decode(const uint8_t *LEAPALIGN_RESTRICT codes, float *LEAPALIGN_RESTRICT to) const {
        for (size_t i = 0; i < kWidth; ++i) to[i] = values[codes[i]];
    }
};

template <bool kSigned>
struct Encoder {
    Vector slope, offset, cap, above, tie;

    explicit Encoder(const Map &map)
        : slope(load(map.slope)), offset(load(map.offset)), cap(load(map.cap)), above(load(map.above)), tie(spread(map.tie)) {}

    // Writes codes and returns how far behind an integer the places are: below kDoubt a code is to be looked up.
    LEAPALIGN_METHOD Vector encode(const float *x, Vector inverse, uint8_t *codes) const {
        const Vector y = mul(load(x), inverse), sign = spread(-0.0f);
        const Vector size = _mm256_max_ps(_mm256_andnot_ps(sign, y), spread(kSmallest));
        const Vector guess = _mm256_fmadd_ps(_mm256_cvtepi32_ps(bits(size)), spread(kSlotScale), spread(kSlotOffset));
        __m256i slot = _mm256_cvttps_epi32(guess);
        const Vector next = _mm256_cmp_ps(size, _mm256_permutevar8x32_ps(above, slot), _CMP_GT_OQ);
        slot = _mm256_sub_epi32(slot, bits(next));
        Vector place = _mm256_fmadd_ps(size, _mm256_permutevar8x32_ps(slope, slot), _mm256_permutevar8x32_ps(offset, slot));
        place = least(place, _mm256_permutevar8x32_ps(cap, slot));
        const __m256i floor = _mm256_cvttps_epi32(place);
        Vector behind = sub(place, _mm256_cvtepi32_ps(floor));
        if (kSigned) behind = _mm256_andnot_ps(_mm256_cmp_ps(size, tie, _CMP_EQ_OQ), behind);
        __m256i code = floor;
        if (kSigned) {  // saturation turns the place -128, which has no code, into -127
            code = _mm256_sign_epi32(floor, _mm256_or_si256(bits(y), _mm256_set1_epi32(1)));
            code = _mm256_sub_epi32(code, _mm256_set1_epi32(1));
        }
        __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        __m128i bytes = kSigned ? _mm_packs_epi16(words, words) : _mm_packus_epi16(words, words);
        if (kSigned) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
        _mm_storel_epi64(reinterpret_cast<__m128i *>(codes), bytes);
        return behind;
    }
};

// Philox4x32-10 on four counters a register, in the lower halves of 64-bit lanes; upper halves hold anything.
LEAPALIGN_NOINLINE void draw_block(const Stream &stream, uint64_t first,  // a multiple of 32
                                   uint16_t *draws                        // (256,)
) {
    const __m256i a = _mm256_set1_epi64x(kPhiloxA), c = _mm256_set1_epi64x(kPhiloxC);
    // So that interleaving 64-bit lanes leaves the counters in order.
    const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);
    for (int group = 0; group < 8; group += 2) {  // two registers each: sixteen names are all there are
        __m256i c0[2], c1[2], c2[2], c3[2];
        for (int i = 0; i < 2; ++i) {
            const uint64_t counter = (first & 0xFFFFFFFFu) + 4 * static_cast<uint64_t>(group + i);
            c0[i] = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(counter)), order);
            c1[i] = _mm256_set1_epi64x(static_cast<int64_t>(first >> 32));
            c2[i] = _mm256_set1_epi64x(stream.parameter);
            c3[i] = _mm256_set1_epi64x(stream.step);
        }
        uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const __m256i key0 = _mm256_set1_epi64x(k0), key1 = _mm256_set1_epi64x(k1);
            for (int i = 0; i < 2; ++i) {
                const __m256i p0 = _mm256_mul_epu32(a, c0[i]), p1 = _mm256_mul_epu32(c, c2[i]);
                c0[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[i]), key0);
                c2[i] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[i]), key1);
                c1[i] = p1;
                c3[i] = p0;
            }
            k0 += kPhiloxKey0;
            k1 += kPhiloxKey1;
        }
        for (int i = 0; i < 2; ++i) {
            const __m256i ab = _mm256_blend_epi32(c0[i], _mm256_slli_epi64(c1[i], 32), 0xAA);
            const __m256i cd = _mm256_blend_epi32(c2[i], _mm256_slli_epi64(c3[i], 32), 0xAA);
            uint16_t *to = draws + 32 * (group + i);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm256_unpacklo_epi64(ab, cd));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 16), _mm256_unpackhi_epi64(ab, cd));
        }
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
