// Sixteen elements at a time: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kWidth = 16;
using Vector = __m512;

LEAPALIGN_INLINE __m512i bits(Vector x) { return _mm512_castps_si512(x); }
LEAPALIGN_INLINE Vector spread(float value) { return _mm512_set1_ps(value); }
LEAPALIGN_INLINE Vector load(const float *from) { return _mm512_loadu_ps(from); }
LEAPALIGN_INLINE Vector load(const uint16_t *from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
LEAPALIGN_INLINE void store(float *to, Vector x) { _mm512_storeu_ps(to, x); }
LEAPALIGN_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
LEAPALIGN_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
LEAPALIGN_INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
LEAPALIGN_INLINE Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
LEAPALIGN_INLINE Vector root_of(Vector a) { return _mm512_sqrt_ps(a); }
LEAPALIGN_INLINE Vector least(Vector a, Vector b) { return _mm512_min_ps(a, b); }
LEAPALIGN_INLINE bool any_below(Vector a, float limit) {
    return _mm512_cmp_ps_mask(a, _mm512_set1_ps(limit), _CMP_LT_OQ) != 0;
}

LEAPALIGN_INLINE void store_stochastic(uint16_t *to, Vector x, const uint16_t *draws) {
    const __m512i magnitude = _mm512_and_si512(bits(x), _mm512_set1_epi32(0x7FFFFFFF));
    if (_mm512_cmpge_epu32_mask(magnitude, _mm512_set1_epi32(0x7F7F0000))) {  // may saturate, or is not finite
        alignas(64) float values[kWidth];
        _mm512_store_ps(values, x);
        for (size_t i = 0; i < kWidth; ++i) to[i] = rounded_with_draw(values[i], draws[i]);
        return;
    }
    const __m512i draw = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(draws)));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits(x), draw), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16(rounded));
}

// The largest |x| by its bits, in which nan is above infinity: vmaxps would lose it.
struct Peak {
    __m512i doubled = _mm512_setzero_si512();
    LEAPALIGN_METHOD void include(Vector x) {
        doubled = _mm512_max_epu32(doubled, _mm512_add_epi32(bits(x), bits(x)));
    }
    LEAPALIGN_METHOD uint32_t all() const { return _mm512_reduce_max_epu32(doubled) >> 1; }
};

template <bool kSigned>
struct Decoder {
    Vector slope, offset;
    __m512i fixes[2];

    explicit Decoder(const Map &map)
        : slope(load(map.value_slope)), offset(load(map.value_offset)), fixes{_mm512_loadu_si512(map.fixes), _mm512_loadu_si512(map.fixes + 16)} {}

    // kWidth codes to the values of the map, by the lines of Map: a third of the instructions of sixteen look-ups.
    LEAPALIGN_METHOD void decode(const uint8_t *codes, float *to) const {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(codes)));
        const __m512i place = _mm512_add_epi32(code, _mm512_set1_epi32(kSigned ? -127 : 1));
        const Vector f = _mm512_cvtepi32_ps(place);
        const __m512i exponent = _mm512_srli_epi32(bits(f), 23);
        const Vector rise = _mm512_permutexvar_ps(exponent, slope);
        Vector start = _mm512_permutexvar_ps(exponent, offset), value;
        if (kSigned) {  // the sign of f; 0, whose exponent is another one's modulo 16, stays 0
            const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80000000u));
            start = _mm512_castsi512_ps(_mm512_ternarylogic_epi32(bits(start), bits(f), sign, 0x78));  // a ^ (b & c)
            value = _mm512_maskz_fmadd_ps(_mm512_test_epi32_mask(place, place), f, rise, start);
        } else {
            value = _mm512_fmadd_ps(f, rise, start);
        }
        const __m512i eight = _mm512_permutex2var_epi32(fixes[0], _mm512_srli_epi32(code, 3), fixes[1]);
        const __m512i fix = _mm512_rorv_epi32(eight, _mm512_slli_epi32(code, 2));  // modulo 32
        const __m512i fixed = _mm512_add_epi32(bits(value), _mm512_and_si512(fix, _mm512_set1_epi32(15)));
        _mm512_storeu_si512(to, fixed);
    }
};

template <bool kSigned>
struct Encoder {
    Vector slope[2], offset[2], cap[2], above[2], tie;

    explicit Encoder(const Map &map) : tie(spread(map.tie)) {
        for (size_t half = 0; half < 2; ++half) {
            slope[half] = load(map.exponent_slope + 16 * half);
            offset[half] = load(map.exponent_offset + 16 * half);
            cap[half] = load(map.exponent_cap + 16 * half);
            above[half] = load(map.exponent_above + 16 * half);
        }
    }

    // Writes codes and returns how far behind an integer the places are: below kDoubt a code is to be looked up. What
    // is above the slot that its exponent begins in has the line of the next exponent, in which the next slot began.
    LEAPALIGN_METHOD Vector encode(const float *x, Vector inverse, uint8_t *codes) const {
        const Vector y = mul(load(x), inverse);
        const Vector size = _mm512_range_ps(y, spread(kSmallest), 0x0B);  // the larger magnitude
        __m512i exponent = _mm512_srli_epi32(bits(size), 23);
        const __mmask16 next = _mm512_cmp_ps_mask(size, pick(above, exponent), _CMP_GT_OQ);
        exponent = _mm512_mask_add_epi32(exponent, next, exponent, _mm512_set1_epi32(1));
        Vector place = _mm512_fmadd_ps(size, pick(slope, exponent), pick(offset, exponent));
        place = least(place, pick(cap, exponent));
        const __m512i floor = _mm512_cvttps_epi32(place);
        const __mmask16 clear = kSigned ? _mm512_cmp_ps_mask(size, tie, _CMP_NEQ_OQ) : __mmask16{0xFFFF};
        const Vector behind = _mm512_maskz_sub_ps(clear, place, _mm512_cvtepi32_ps(floor));
        __m128i bytes;
        if (kSigned) {  // saturation turns the place -128, which has no code, into -127
            const __m512i code = _mm512_mask_sub_epi32(floor, _mm512_movepi32_mask(bits(y)), _mm512_setzero_si512(), floor);
            bytes = _mm512_cvtsepi32_epi8(_mm512_sub_epi32(code, _mm512_set1_epi32(1)));
            bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
        } else {
            bytes = _mm512_cvtepi32_epi8(floor);
        }
        _mm_storeu_si128(reinterpret_cast<__m128i *>(codes), bytes);
        return behind;
    }

    LEAPALIGN_METHOD static Vector pick(const Vector (&table)[2], __m512i exponent) {
        return _mm512_permutex2var_ps(table[0], exponent, table[1]);
    }
};

// Philox4x32-10 on eight counters a register, in the lower halves of 64-bit lanes; upper halves hold anything.
LEAPALIGN_NOINLINE void draw_block(const Stream &stream, uint64_t first,  // a multiple of 32
                                   uint16_t *draws                        // (256,)
) {
    const __m512i a = _mm512_set1_epi64(kPhiloxA), c = _mm512_set1_epi64(kPhiloxC);
    // So that interleaving 64-bit lanes leaves the counters in order.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    __m512i c0[4], c1[4], c2[4], c3[4];
    for (int i = 0; i < 4; ++i) {
        c0[i] = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>((first & 0xFFFFFFFFu) + 8 * i)), order);
        c1[i] = _mm512_set1_epi64(static_cast<int64_t>(first >> 32));
        c2[i] = _mm512_set1_epi64(stream.parameter);
        c3[i] = _mm512_set1_epi64(stream.step);
    }
    uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
        for (int i = 0; i < 4; ++i) {
            const __m512i p0 = _mm512_mul_epu32(a, c0[i]), p1 = _mm512_mul_epu32(c, c2[i]);
            c0[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[i], key0, 0x96);
            c2[i] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[i], key1, 0x96);
            c1[i] = p1;
            c3[i] = p0;
        }
        k0 += kPhiloxKey0;
        k1 += kPhiloxKey1;
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i ab = _mm512_mask_shuffle_epi32(c0[i], 0xAAAA, c1[i], _MM_PERM_CCAA);
        const __m512i cd = _mm512_mask_shuffle_epi32(c2[i], 0xAAAA, c3[i], _MM_PERM_CCAA);
        _mm512_storeu_si512(draws + 64 * i, _mm512_unpacklo_epi64(ab, cd));
        _mm512_storeu_si512(draws + 64 * i + 32, _mm512_unpackhi_epi64(ab, cd));
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
