// One element at a time: any processor. The compiler may still vectorise what it can.
#pragma once

#include <cmath>

#include "elementwise.h"
#include "vectors/lanes.h"
#include "adamw8bit/philox.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kWidth = 1, kGroup = 4 * kWidth, kDrawn = kBlock;
using Vector = float;

LEAPALIGN_INLINE size_t element_of(size_t position) { return element_at<kWidth>(position); }

LEAPALIGN_INLINE Vector spread(float value) { return value; }
LEAPALIGN_INLINE Vector load(const float *from) { return *from; }
LEAPALIGN_INLINE void store(float *to, Vector x) { *to = x; }
LEAPALIGN_INLINE Vector add(Vector a, Vector b) { return a + b; }
LEAPALIGN_INLINE Vector sub(Vector a, Vector b) { return a - b; }
LEAPALIGN_INLINE Vector mul(Vector a, Vector b) { return a * b; }
LEAPALIGN_INLINE Vector div(Vector a, Vector b) { return a / b; }
LEAPALIGN_INLINE Vector root_of(Vector a) { return std::sqrt(a); }

// Consecutive elements, as two vectors of a group hold them.
struct Pair {
    Vector first, second;
};

LEAPALIGN_INLINE Pair load_pair(const uint16_t *from) { return {widened(from[0]), widened(from[1])}; }
LEAPALIGN_INLINE Pair load_pair(const float *from) { return {from[0], from[1]}; }
LEAPALIGN_INLINE void store_pair(float *to, Pair x) { to[0] = x.first, to[1] = x.second; }

LEAPALIGN_INLINE bool any_huge(const Vector (&)[4]) { return false; }  // store_rounded takes any

LEAPALIGN_INLINE void store_rounded(uint16_t *to, Pair x, const uint16_t *draws) {
    to[0] = rounded_with_draw(x.first, draws[0]);
    to[1] = rounded_with_draw(x.second, draws[1]);
}

// The largest |x| by its bits.
struct Peak {
    uint32_t bits = 0;
    LEAPALIGN_METHOD void include(Vector x) {
        const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
        bits = magnitude > bits ? magnitude : bits;
    }
    LEAPALIGN_METHOD uint32_t all() const { return bits; }
};
using UnsignedPeak = Peak;

template <bool kSigned>
struct Decoder {
    const float *values;
    explicit Decoder(const Map &map) : values(map.decoded) {}

    // kGroup codes to Map::decoded.
    LEAPALIGN_METHOD void decode(const uint8_t *LEAPALIGN_RESTRICT codes, float *LEAPALIGN_RESTRICT to) const {
        for (size_t i = 0; i < kGroup; ++i) to[i] = values[codes[i]];
    }
};

struct Doubt {  // none: every code is looked up
    LEAPALIGN_METHOD void include(Doubt) {}
    LEAPALIGN_METHOD uint32_t elements() const { return 0; }
};

template <bool kSigned>
struct Encoder {
    const Map &map;
    explicit Encoder(const Map &of) : map(of) {}

    LEAPALIGN_METHOD static float factor_of(const Map &, float inverse) { return inverse; }

    LEAPALIGN_METHOD Doubt places(const float *, Vector) const { return {}; }

    // Writes the codes of a group.
    LEAPALIGN_METHOD Doubt encode(const float *x, Vector inverse, uint8_t *codes) const {
        for (size_t i = 0; i < kGroup; ++i) {
            const uint8_t code = map.code(x[i] * inverse);
            codes[i] = !kSigned && code == 0 ? uint8_t{1} : code;
        }
        return {};
    }
};

using Draws = Philox<1>;

// As arrays over the counters.
LEAPALIGN_INLINE void draw_group(const Draws &philox, uint32_t counter,  // a multiple of 32
                                 uint16_t *draws                          // (256,)
) {
    uint32_t c0[32], c1[32], c2[32], c3[32];
    const auto upper = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
    const auto lower = [](uint64_t word) { return static_cast<uint32_t>(word); };
    for (uint32_t i = 0; i < 32; ++i) {
        uint64_t p0 = uint64_t{kPhiloxA} * (counter + i), p1 = uint64_t{kPhiloxC} * (upper(p0) ^ philox.third1.value());
        c0[i] = upper(p1) ^ philox.first2.value(), c1[i] = lower(p1);
        p1 = uint64_t{kPhiloxC} * (lower(p0) ^ philox.third2.value()), p0 = uint64_t{kPhiloxA} * c0[i];
        c0[i] = upper(p1) ^ c1[i] ^ philox.keys[0].value(), c1[i] = lower(p1);
        c2[i] = upper(p0) ^ philox.third3.value(), c3[i] = lower(p0);
    }
    for (size_t round = 4; round <= kRounds; ++round) {
        const uint32_t key0 = philox.keys[2 * round - 7].value(), key1 = philox.keys[2 * round - 6].value();
        for (size_t i = 0; i < 32; ++i) {
            const uint64_t p0 = uint64_t{kPhiloxA} * c0[i], p1 = uint64_t{kPhiloxC} * c2[i];
            c0[i] = upper(p1) ^ c1[i] ^ key0, c1[i] = lower(p1);
            c2[i] = upper(p0) ^ c3[i] ^ key1, c3[i] = lower(p0);
        }
    }
    for (size_t i = 0; i < 32; ++i) {  // words in order, the low half first
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        for (size_t w = 0; w < 4; ++w) {
            draws[8 * i + 2 * w] = static_cast<uint16_t>(words[w]);
            draws[8 * i + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
        }
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
