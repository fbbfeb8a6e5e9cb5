// Sixteen elements at a time: AVX-512 F, BW, DQ and VL; and VBMI, where it is compiled for that.
#pragma once

#include <immintrin.h>

#include "elementwise.h"
#include "vectors/lanes.h"
#include "adamw8bit/philox.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kWidth = 16, kGroup = 4 * kWidth, kDrawn = 256;
using Vector = __m512;

LEAPALIGN_INLINE size_t element_of(size_t position) { return element_at<kWidth>(position); }

LEAPALIGN_INLINE __m512i bits(Vector x) { return _mm512_castps_si512(x); }
LEAPALIGN_INLINE Vector spread(float value) { return _mm512_set1_ps(value); }
LEAPALIGN_INLINE Vector load(const float *from) { return _mm512_loadu_ps(from); }
LEAPALIGN_INLINE void store(float *to, Vector x) { _mm512_storeu_ps(to, x); }
LEAPALIGN_INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
LEAPALIGN_INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
LEAPALIGN_INLINE Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
LEAPALIGN_INLINE Vector div(Vector a, Vector b) { return _mm512_div_ps(a, b); }
LEAPALIGN_INLINE Vector root_of(Vector a) { return _mm512_sqrt_ps(a); }

// Consecutive elements, as two vectors of a group hold them.
struct Pair {
    Vector first, second;
};

LEAPALIGN_INLINE Pair load_pair(const uint16_t *from) {
    const __m512i half = _mm512_loadu_si512(from), zero = _mm512_setzero_si512();
    return {_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, half)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, half))};
}
LEAPALIGN_INLINE Pair load_pair(const float *from) {
    const Vector low = load(from), high = load(from + kWidth);
    return {_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xDD)};
}
LEAPALIGN_INLINE void store_pair(float *to, Pair x) {
    const Vector even = _mm512_shuffle_f32x4(x.first, x.second, 0x44), odd = _mm512_shuffle_f32x4(x.first, x.second, 0xEE);
    store(to, _mm512_shuffle_f32x4(even, even, 0xD8));
    store(to + kWidth, _mm512_shuffle_f32x4(odd, odd, 0xD8));
}

// Whether some |x| is 2^126 or more, or not finite: the sum overflows, whatever was in it, and stays so.
LEAPALIGN_INLINE bool any_huge(const Vector (&x)[4]) {
    const Vector four = spread(4);
    Vector sum = mul(x[0], four);
    for (size_t i = 1; i < 4; ++i) sum = _mm512_fmadd_ps(x[i], four, sum);
    return _mm512_fpclass_ps_mask(sum, 0x99) != 0;  // infinities and nans
}

LEAPALIGN_INLINE void store_rounded(uint16_t *to, Pair x, const uint16_t *draws) {
    const __m512i draw = _mm512_loadu_si512(draws), zero = _mm512_setzero_si512();
    const __m512i first = _mm512_add_epi32(bits(x.first), _mm512_unpacklo_epi16(draw, zero));
    const __m512i second = _mm512_add_epi32(bits(x.second), _mm512_unpackhi_epi16(draw, zero));
    _mm512_storeu_si512(to, _mm512_packus_epi32(_mm512_srli_epi32(first, 16), _mm512_srli_epi32(second, 16)));
}

// The largest |x| by its bits; nan may be lost.
struct Peak {
    Vector largest = _mm512_setzero_ps();
    LEAPALIGN_METHOD void include(Vector x) { largest = _mm512_range_ps(largest, x, 0x0B); }
    LEAPALIGN_METHOD uint32_t all() const { return static_cast<uint32_t>(_mm512_reduce_max_epi32(bits(largest))); }
};

// The same for x that have no sign, in whose bits nan is above infinity.
struct UnsignedPeak {
    __m512i largest = _mm512_setzero_si512();
    LEAPALIGN_METHOD void include(Vector x) { largest = _mm512_max_epu32(largest, bits(x)); }
    LEAPALIGN_METHOD uint32_t all() const { return _mm512_reduce_max_epu32(largest); }
};

// Codes as they are in memory, to and from lanes that hold eight of each pair.
LEAPALIGN_INLINE __m512i load_codes(const uint8_t *codes) {
    return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), _mm512_loadu_si512(codes));
}
LEAPALIGN_INLINE void store_codes(uint8_t *codes, __m512i bytes) {
    _mm512_storeu_si512(codes, _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), bytes));
}

LEAPALIGN_INLINE __m512i kept(uint32_t each) {
    __m512i all = _mm512_set1_epi32(static_cast<int32_t>(each));
    LEAPALIGN_KEPT(all);
    return all;
}

#if defined(__AVX512VBMI__)

// Looks up the four bytes of each value in tables of 64: 256 of them take four permutations; magnitudes of the signed
// map take two.
template <bool kSigned>
struct Decoder {
    static constexpr size_t kTables = kSigned ? 2 : 4;
    alignas(64) uint8_t tables[4][kTables][64];
    __m512i sixty_fours = kept(0x40404040), ones = kept(0x01010101), signs = kept(0x80808080), zeros = kept(0x7F7F7F7F);

    explicit Decoder(const Map &map) {
        for (size_t i = 0; i < 64 * kTables; ++i) {
            // 128, the place of 1, is looked up as 0, which has zeros set instead.
            const uint32_t value = bits_of(map.decoded[!kSigned ? i : i ? 127 + i : 255]);
            for (size_t byte = 0; byte < 4; ++byte) tables[byte][i / 64][i % 64] = static_cast<uint8_t>(value >> (8 * byte));
        }
    }

    // kGroup codes to Map::decoded.
    LEAPALIGN_METHOD void decode(const uint8_t *codes, float *to) const {
        const __m512i code = load_codes(codes);
        __m512i index = code, bytes[4];
        __mmask64 above[3], nonzero{};
        if (kSigned) {
            index = _mm512_abs_epi8(_mm512_sub_epi8(code, zeros));
            nonzero = _mm512_test_epi8_mask(index, index);
            above[0] = _mm512_test_epi8_mask(index, sixty_fours);
        } else {
            above[0] = _mm512_test_epi8_mask(code, sixty_fours);  // of those above 128, undone by the third
            above[1] = _mm512_movepi8_mask(code);
            above[2] = _kand_mask64(above[0], above[1]);
        }
        for (size_t byte = 0; byte < 4; ++byte) {
            const auto table = [&](size_t i) { return _mm512_load_si512(tables[byte][i]); };
            bytes[byte] = kSigned && byte >= 2 ? _mm512_maskz_permutexvar_epi8(nonzero, index, table(0))
                                               : _mm512_permutexvar_epi8(index, table(0));
            for (size_t i = 1; i < kTables; ++i) {
                bytes[byte] = _mm512_mask_permutexvar_epi8(bytes[byte], above[i - 1], index, table(i));
            }
        }
        if (kSigned) {  // negative below 127: no upper bit in code + 1, saturated
            const __m512i sign = _mm512_adds_epu8(code, ones);
            bytes[3] = _mm512_ternarylogic_epi32(bytes[3], sign, signs, 0xF2);  // a | (~b & c)
        }
        const __m512i low_a = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high_a = _mm512_unpacklo_epi8(bytes[2], bytes[3]);
        const __m512i low_b = _mm512_unpackhi_epi8(bytes[0], bytes[1]), high_b = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
        _mm512_store_si512(to, _mm512_unpacklo_epi16(low_a, high_a));
        _mm512_store_si512(to + kWidth, _mm512_unpackhi_epi16(low_a, high_a));
        _mm512_store_si512(to + 2 * kWidth, _mm512_unpacklo_epi16(low_b, high_b));
        _mm512_store_si512(to + 3 * kWidth, _mm512_unpackhi_epi16(low_b, high_b));
    }
};

#else

template <bool kSigned>
struct Decoder {
    Vector slope, offset;
    __m512i fixes[2], widen[4];

    explicit Decoder(const Map &map) : slope(load(map.value_slope)), offset(load(map.value_offset)) {
        for (size_t i = 0; i < 2; ++i) fixes[i] = _mm512_loadu_si512(map.fixes + 16 * i);
        // Bytes 4 i .. 4 i + 3 of each lane, each with three zeros.
        for (int i = 0; i < 4; ++i) widen[i] = _mm512_add_epi32(_mm512_set1_epi32(4 * i - 256), _mm512_set4_epi32(3, 2, 1, 0));
    }

    // kGroup codes to Map::decoded, by the lines of Map: a third of the instructions of as many look-ups.
    LEAPALIGN_METHOD void decode(const uint8_t *codes, float *to) const {
        const __m512i bytes = load_codes(codes);
        for (size_t i = 0; i < 4; ++i) store(to + kWidth * i, values_of(_mm512_shuffle_epi8(bytes, widen[i])));
    }

    LEAPALIGN_METHOD Vector values_of(__m512i code) const {
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
        value = _mm512_castsi512_ps(_mm512_add_epi32(bits(value), _mm512_and_si512(fix, _mm512_set1_epi32(15))));
        return kSigned ? value : mul(value, value);
    }
};

#endif

// How far behind an integer the places of a group are, at least: in units of 2^-16, in the lower word of each element.
struct Doubt {
    __m512i words = _mm512_set1_epi32(-1);
    LEAPALIGN_METHOD void include(__m512i places) { words = _mm512_min_epu16(words, places); }
    LEAPALIGN_METHOD void include(const Doubt &other) { include(other.words); }
    LEAPALIGN_METHOD uint32_t elements() const {  // a bit for each
        const __m512i behind = _mm512_and_si512(words, _mm512_set1_epi32(0xFFFF));
        return _mm512_cmplt_epu32_mask(behind, _mm512_set1_epi32(kDoubt));
    }
};

template <bool kSigned>
struct Encoder {
    Vector slope, offset, later, shift;
    __m512i halves = kept(0xFFFF0000u), odd = kept(0xFF00FF00u), zeros = kept(0x7F7F7F7F);

    explicit Encoder(const Map &map) : shift(spread(map.shift)) {
        const Vector unit = spread(kUnit), base = spread(kSigned ? kBase : 0.0f);
        slope = mul(load(map.slope), unit);
        offset = add(mul(load(map.offset), unit), base);
        later = add(mul(load(map.later), unit), mul(base, spread(0.75f)));
    }

    LEAPALIGN_METHOD static float factor_of(const Map &map, float inverse) { return inverse * map.scale; }

    // Places, in units of 2^-16; in the signed map as the bits of kBase plus them.
    LEAPALIGN_METHOD __m512i places(const float *x, Vector factor) const {
        const Vector magnitude = kSigned ? _mm512_abs_ps(load(x)) : load(x);
        const Vector size = _mm512_fmadd_ps(magnitude, factor, shift);
        const __m512i products = _mm512_madd_epi16(bits(size), _mm512_set1_epi32(kRangeFactor << 16));
        const __m512i range = _mm512_srli_epi32(products, kRangeShift);
        const Vector rise = _mm512_permutexvar_ps(range, slope), start = _mm512_permutexvar_ps(range, offset);
        const Vector place = _mm512_fmadd_ps(size, rise, start);
        const Vector next = _mm512_fmadd_ps(place, spread(0.25f), _mm512_permutexvar_ps(range, later));
        return kSigned ? bits(_mm512_min_ps(place, next)) : _mm512_cvttps_epi32(_mm512_min_ps(place, next));
    }

    // Writes the codes of a group. Those of elements in doubt are to be looked up.
    LEAPALIGN_METHOD Doubt encode(const float *x, Vector factor, uint8_t *codes) const {
        __m512i all[4];
        Doubt doubt;
        for (size_t i = 0; i < 4; ++i) {
            all[i] = places(x + kWidth * i, factor);
            doubt.include(all[i]);
        }
        store_codes(codes, packed(all, x));
        return doubt;
    }

    // The third bytes, and then the sum or the difference of 127 and each.
    LEAPALIGN_METHOD __m512i packed(const __m512i (&all)[4], const float *x) const {
        __m512i words[2];
        for (size_t i = 0; i < 2; ++i) {  // a | (b & c)
            words[i] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(all[2 * i], 16), all[2 * i + 1], halves, 0xF8);
        }
        __m512i bytes = _mm512_ternarylogic_epi32(words[0], _mm512_slli_epi32(words[1], 8), odd, 0xD8);  // c ? b : a
        // Of each lane, four from each vector, as packing would leave them.
        bytes = _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0F0B0703, 0x0D090501, 0x0E0A0602, 0x0C080400));
        if (kSigned) {
            for (size_t i = 0; i < 2; ++i) {
                const float *from = x + 2 * kWidth * i;
                words[i] = _mm512_packs_epi32(_mm512_loadu_si512(from), _mm512_loadu_si512(from + kWidth));
            }
            const __mmask64 negative = _mm512_movepi8_mask(_mm512_packs_epi16(words[0], words[1]));
            bytes = _mm512_mask_subs_epu8(_mm512_add_epi8(zeros, bytes), negative, zeros, bytes);  // 127 - 128 is 0
        }
        return bytes;
    }
};

using Draws = Philox<8>;

// Words of eight counters a register, in the lower halves of 64-bit lanes; upper halves hold anything. Four registers at
// once: the rounds wait for their products.
LEAPALIGN_INLINE void draw_group(const Draws &philox, uint32_t counter,  // a multiple of 32
                                 uint16_t *draws                         // (256,)
) {
    const auto all = [](const Draws::Word &word) { return _mm512_load_si512(word.copies); };
    const auto upper = [](__m512i product) { return _mm512_srli_epi64(product, 32); };
    const __m512i a = _mm512_set1_epi64(kPhiloxA), c = _mm512_set1_epi64(kPhiloxC);
    // So that interleaving 64-bit lanes leaves the counters in order.
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    __m512i c0[4], c1[4], c2[4], c3[4];
    for (uint32_t i = 0; i < 4; ++i) {
        const __m512i p0 = _mm512_mul_epu32(a, _mm512_add_epi64(_mm512_set1_epi64(counter + 8 * i), order));
        c1[i] = _mm512_mul_epu32(c, _mm512_xor_si512(upper(p0), all(philox.third1)));
        c0[i] = _mm512_xor_si512(upper(c1[i]), all(philox.first2));
        c2[i] = _mm512_xor_si512(p0, all(philox.third2));
    }
    for (size_t i = 0; i < 4; ++i) {
        const __m512i p0 = _mm512_mul_epu32(a, c0[i]), p1 = _mm512_mul_epu32(c, c2[i]);
        c0[i] = _mm512_ternarylogic_epi64(upper(p1), c1[i], all(philox.keys[0]), 0x96);
        c2[i] = _mm512_xor_si512(upper(p0), all(philox.third3));
        c1[i] = p1, c3[i] = p0;
    }
    for (size_t round = 4; round <= kRounds; ++round) {
        for (size_t i = 0; i < 4; ++i) {
            const __m512i p0 = _mm512_mul_epu32(a, c0[i]), p1 = _mm512_mul_epu32(c, c2[i]);
            c0[i] = _mm512_ternarylogic_epi64(upper(p1), c1[i], all(philox.keys[2 * round - 7]), 0x96);
            c2[i] = _mm512_ternarylogic_epi64(upper(p0), c3[i], all(philox.keys[2 * round - 6]), 0x96);
            c1[i] = p1, c3[i] = p0;
        }
    }
    for (size_t i = 0; i < 4; ++i) {
        const __m512i ab = _mm512_mask_shuffle_epi32(c0[i], 0xAAAA, c1[i], _MM_PERM_CCAA);
        const __m512i cd = _mm512_mask_shuffle_epi32(c2[i], 0xAAAA, c3[i], _MM_PERM_CCAA);
        _mm512_storeu_si512(draws + 64 * i, _mm512_unpacklo_epi64(ab, cd));
        _mm512_storeu_si512(draws + 64 * i + 32, _mm512_unpackhi_epi64(ab, cd));
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
