// Eight elements at a time: AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <type_traits>

#include "elementwise.h"
#include "vectors/lanes.h"
#include "adamw8bit/philox.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kWidth = 8, kGroup = 4 * kWidth, kDrawn = 64;
using Vector = __m256;

LEAPALIGN_INLINE size_t element_of(size_t position) { return element_at<kWidth>(position); }

LEAPALIGN_INLINE __m256i bits(Vector x) { return _mm256_castps_si256(x); }
LEAPALIGN_INLINE __m256i load_bits(const void *from) { return _mm256_loadu_si256(static_cast<const __m256i *>(from)); }
LEAPALIGN_INLINE void store_bits(void *to, __m256i x) { _mm256_storeu_si256(static_cast<__m256i *>(to), x); }
LEAPALIGN_INLINE Vector spread(float value) { return _mm256_set1_ps(value); }
LEAPALIGN_INLINE Vector load(const float *from) { return _mm256_loadu_ps(from); }
LEAPALIGN_INLINE void store(float *to, Vector x) { _mm256_storeu_ps(to, x); }
LEAPALIGN_INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
LEAPALIGN_INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
LEAPALIGN_INLINE Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
LEAPALIGN_INLINE Vector div(Vector a, Vector b) { return _mm256_div_ps(a, b); }
LEAPALIGN_INLINE Vector root_of(Vector a) { return _mm256_sqrt_ps(a); }

// Consecutive elements, as two vectors of a group hold them.
struct Pair {
    Vector first, second;
};

LEAPALIGN_INLINE Pair load_pair(const uint16_t *from) {
    const __m256i half = load_bits(from), zero = _mm256_setzero_si256();
    return {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, half)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, half))};
}
LEAPALIGN_INLINE Pair load_pair(const float *from) {
    const Vector low = load(from), high = load(from + kWidth);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
}
LEAPALIGN_INLINE void store_pair(float *to, Pair x) {
    store(to, _mm256_permute2f128_ps(x.first, x.second, 0x20));
    store(to + kWidth, _mm256_permute2f128_ps(x.first, x.second, 0x31));
}

// Whether some |x| is 2^126 or more, or not finite: the sum overflows, whatever was in it, and stays so.
LEAPALIGN_INLINE bool any_huge(const Vector (&x)[4]) {
    const Vector four = spread(4);
    Vector sum = mul(x[0], four);
    for (size_t i = 1; i < 4; ++i) sum = _mm256_fmadd_ps(x[i], four, sum);
    const Vector zero_or_nan = sub(sum, sum);
    return _mm256_movemask_ps(_mm256_cmp_ps(zero_or_nan, zero_or_nan, _CMP_UNORD_Q)) != 0;
}

LEAPALIGN_INLINE void store_rounded(uint16_t *to, Pair x, const uint16_t *draws) {
    const __m256i draw = load_bits(draws), zero = _mm256_setzero_si256();
    const __m256i first = _mm256_add_epi32(bits(x.first), _mm256_unpacklo_epi16(draw, zero));
    const __m256i second = _mm256_add_epi32(bits(x.second), _mm256_unpackhi_epi16(draw, zero));
    store_bits(to, _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16)));
}

LEAPALIGN_INLINE uint32_t largest_of(__m256i x) {
    __m128i two = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    two = _mm_max_epu32(two, _mm_shuffle_epi32(two, 0x4E));
    two = _mm_max_epu32(two, _mm_shuffle_epi32(two, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(two));
}

// The largest |x| by its bits.
struct Peak {
    __m256i doubled = _mm256_setzero_si256();
    LEAPALIGN_METHOD void include(Vector x) { doubled = _mm256_max_epu32(doubled, _mm256_add_epi32(bits(x), bits(x))); }
    LEAPALIGN_METHOD uint32_t all() const { return largest_of(doubled) >> 1; }
};

// The same for x that have no sign, in whose bits nan is above infinity.
struct UnsignedPeak {
    __m256i largest = _mm256_setzero_si256();
    LEAPALIGN_METHOD void include(Vector x) { largest = _mm256_max_epu32(largest, bits(x)); }
    LEAPALIGN_METHOD uint32_t all() const { return largest_of(largest); }
};

template <bool kSigned>
struct Decoder {
    uint32_t values[256][2];  // 0 and their bits

    explicit Decoder(const Map &map) {
        for (size_t i = 0; i < 256; ++i) values[i][0] = 0, values[i][1] = bits_of(map.decoded[i]);
    }

    // kGroup codes to Map::decoded, two at once, by loads of single values: a step with gathers takes longer.
    LEAPALIGN_METHOD void decode(const uint8_t *LEAPALIGN_RESTRICT codes, float *LEAPALIGN_RESTRICT to) const {
        LEAPALIGN_UNROLL
        for (size_t i = 0; i < kGroup; i += 2) {
            const uint8_t *const two = codes + element_of(i);
            uint64_t both = values[two[0]][1], second;
            LEAPALIGN_SCALAR(both);
            std::memcpy(&second, values[two[1]], sizeof second);  // in the upper half
            both |= second;
            LEAPALIGN_SCALAR(both);
            std::memcpy(to + i, &both, sizeof both);
        }
    }
};

// How far behind an integer the places of a group are, at least: in units of 2^-16, in the lower word of each element.
struct Doubt {
    __m256i words = _mm256_set1_epi32(-1);
    LEAPALIGN_METHOD void include(__m256i places) { words = _mm256_min_epu16(words, places); }
    LEAPALIGN_METHOD void include(const Doubt &other) { include(other.words); }
    LEAPALIGN_METHOD uint32_t elements() const {  // a bit for each
        const __m256i behind = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
        const __m256i close = _mm256_cmpgt_epi32(_mm256_set1_epi32(kDoubt), behind);
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(close)));
    }
};

template <bool kSigned>
struct Encoder {
    Vector slope, offset, later, shift;

    explicit Encoder(const Map &map) : shift(spread(map.shift)) {
        const Vector unit = spread(kUnit), base = spread(kSigned ? kBase : 0.0f);
        slope = mul(load(map.slope), unit);
        offset = add(mul(load(map.offset), unit), base);
        later = add(mul(load(map.later), unit), mul(base, spread(0.75f)));
    }

    LEAPALIGN_METHOD static float factor_of(const Map &map, float inverse) { return inverse * map.scale; }

    // Places, in units of 2^-16; in the signed map as the bits of kBase plus them.
    LEAPALIGN_METHOD __m256i places(const float *x, Vector factor) const {
        const Vector magnitude = kSigned ? _mm256_andnot_ps(spread(-0.0f), load(x)) : load(x);
        const Vector size = _mm256_fmadd_ps(magnitude, factor, shift);
        const __m256i products = _mm256_madd_epi16(bits(size), _mm256_set1_epi32(kRangeFactor << 16));
        const __m256i range = _mm256_srli_epi32(products, kRangeShift);
        const Vector rise = _mm256_permutevar8x32_ps(slope, range), start = _mm256_permutevar8x32_ps(offset, range);
        const Vector place = _mm256_fmadd_ps(size, rise, start);
        const Vector next = _mm256_fmadd_ps(place, spread(0.25f), _mm256_permutevar8x32_ps(later, range));
        return kSigned ? bits(_mm256_min_ps(place, next)) : _mm256_cvttps_epi32(_mm256_min_ps(place, next));
    }

    // Writes the codes of a group. Those of elements in doubt are to be looked up.
    LEAPALIGN_METHOD Doubt encode(const float *x, Vector factor, uint8_t *codes) const {
        __m256i words[2];
        Doubt doubt;
        for (size_t i = 0; i < 2; ++i) {
            const float *from = x + 2 * kWidth * i;
            const __m256i first = places(from, factor), second = places(from + kWidth, factor);
            doubt.include(first);
            doubt.include(second);
            words[i] = _mm256_packus_epi32(_mm256_srli_epi32(first, 16), _mm256_srli_epi32(second, 16));
            if (kSigned) {  // 127 and the place with its sign; 127 - 128 is made 0 below
                const __m256i signs = _mm256_packs_epi32(load_bits(from), load_bits(from + kWidth));
                words[i] = _mm256_sign_epi16(_mm256_sub_epi16(words[i], _mm256_set1_epi16(kBaseUpper)), signs);
                words[i] = _mm256_add_epi16(words[i], _mm256_set1_epi16(127));
            }
        }
        // From lanes that hold eight of each pair.
        store_bits(codes, _mm256_permute4x64_epi64(_mm256_packus_epi16(words[0], words[1]), 0xD8));
        return doubt;
    }
};

using Draws = Philox<4>;

// Words of four counters a register, in the lower halves of 64-bit lanes; upper halves hold anything. Two registers at
// once, which is what sixteen names hold: the rounds wait for their products.
LEAPALIGN_INLINE void draw_group(const Draws &philox, uint32_t counter,  // a multiple of 8
                                 uint16_t *draws                         // (64,)
) {
    const auto all = [](const Draws::Word &word) { return load_bits(word.copies); };
    const auto upper = [](__m256i product) { return _mm256_srli_epi64(product, 32); };
    const auto either = [](__m256i x, __m256i y) { return _mm256_xor_si256(x, y); };
    const __m256i a = _mm256_set1_epi64x(kPhiloxA), c = _mm256_set1_epi64x(kPhiloxC);
    // So that interleaving within lanes leaves the counters in order.
    const __m256i order = _mm256_set_epi64x(3, 1, 2, 0);
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (uint32_t i = 0; i < 2; ++i) {
        const __m256i p0 = _mm256_mul_epu32(a, _mm256_add_epi64(_mm256_set1_epi64x(counter + 4 * i), order));
        c1[i] = _mm256_mul_epu32(c, either(upper(p0), all(philox.third1)));
        c0[i] = either(upper(c1[i]), all(philox.first2));
        c2[i] = either(p0, all(philox.third2));
    }
    for (size_t i = 0; i < 2; ++i) {
        const __m256i p0 = _mm256_mul_epu32(a, c0[i]), p1 = _mm256_mul_epu32(c, c2[i]);
        c0[i] = either(either(c1[i], all(philox.keys[0])), upper(p1));
        c2[i] = either(upper(p0), all(philox.third3));
        c1[i] = p1, c3[i] = p0;
    }
    for (size_t round = 4; round <= kRounds; ++round) {
        for (size_t i = 0; i < 2; ++i) {
            const __m256i p0 = _mm256_mul_epu32(a, c0[i]), p1 = _mm256_mul_epu32(c, c2[i]);
            c0[i] = either(either(c1[i], all(philox.keys[2 * round - 7])), upper(p1));
            c2[i] = either(either(c3[i], all(philox.keys[2 * round - 6])), upper(p0));
            c1[i] = p1, c3[i] = p0;
        }
    }
    const auto shuffled = [](__m256i x, __m256i y, auto which) {
        constexpr int kWhich = decltype(which)::value;
        return bits(_mm256_shuffle_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(y), kWhich));
    };
    using Even = std::integral_constant<int, 0x88>;
    using Odd = std::integral_constant<int, 0xDD>;
    for (size_t i = 0; i < 2; ++i) {
        const __m256i ab = shuffled(c0[i], c1[i], Even{}), cd = shuffled(c2[i], c3[i], Even{});
        store_bits(draws + 32 * i, shuffled(ab, cd, Even{}));
        store_bits(draws + 32 * i + 16, shuffled(ab, cd, Odd{}));
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
