// One element at a time: any processor. The compiler may still vectorise what it can.
#pragma once

#include <cmath>

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

constexpr size_t kWidth = 1;
using Vector = float;

LEAPALIGN_INLINE Vector spread(float value) { return value; }
LEAPALIGN_INLINE Vector load(const float *from) { return *from; }
LEAPALIGN_INLINE Vector load(const uint16_t *from) { return widened(*from); }
LEAPALIGN_INLINE void store(float *to, Vector x) { *to = x; }
LEAPALIGN_INLINE Vector add(Vector a, Vector b) { return a + b; }
LEAPALIGN_INLINE Vector sub(Vector a, Vector b) { return a - b; }
LEAPALIGN_INLINE Vector mul(Vector a, Vector b) { return a * b; }
LEAPALIGN_INLINE Vector div(Vector a, Vector b) { return a / b; }
LEAPALIGN_INLINE Vector root_of(Vector a) { return std::sqrt(a); }
LEAPALIGN_INLINE Vector least(Vector a, Vector b) { return a < b ? a : b; }
LEAPALIGN_INLINE bool any_below(Vector a, float limit) { return a < limit; }

LEAPALIGN_INLINE void store_stochastic(uint16_t *to, Vector x, const uint16_t *draws) {
    *to = rounded_with_draw(x, *draws);
}

struct Peak {
    uint32_t bits = 0;
    LEAPALIGN_METHOD void include(Vector x) {
        const uint32_t magnitude = bits_of(x) & 0x7FFFFFFFu;
        bits = magnitude > bits ? magnitude : bits;
    }
    LEAPALIGN_METHOD uint32_t all() const { return bits; }
};

template <bool kSigned>
struct Decoder {
    const float *values;
    explicit Decoder(const Map &map) : values(map.values) {}

    // kWidth codes to the values of the map.
    LEAPALIGN_METHOD void decode(const uint8_t *LEAPALIGN_RESTRICT codes, float *LEAPALIGN_RESTRICT to) const {
        for (size_t i = 0; i < kWidth; ++i) to[i] = values[codes[i]];
    }
};

template <bool kSigned>
struct Encoder {
    const Map &map;
    explicit Encoder(const Map &of) : map(of) {}
    LEAPALIGN_METHOD Vector encode(const float *x, Vector inverse, uint8_t *codes) const {
        const uint8_t code = map.code(*x * inverse);
        *codes = !kSigned && code == 0 ? uint8_t{1} : code;
        return 1.0f;
    }
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as arrays over the
// counters.
LEAPALIGN_NOINLINE void draw_block(const Stream &stream, uint64_t first,  // a multiple of 32
                                   uint16_t *draws                        // (256,)
) {
    uint32_t c0[32], c1[32], c2[32], c3[32];
    for (size_t i = 0; i < 32; ++i) {
        c0[i] = static_cast<uint32_t>(first) + static_cast<uint32_t>(i);
        c1[i] = static_cast<uint32_t>(first >> 32);
        c2[i] = stream.parameter;
        c3[i] = stream.step;
    }
    uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (size_t i = 0; i < 32; ++i) {
            const uint64_t p0 = uint64_t{kPhiloxA} * c0[i], p1 = uint64_t{kPhiloxC} * c2[i];
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(p1);
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += kPhiloxKey0;
        k1 += kPhiloxKey1;
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
