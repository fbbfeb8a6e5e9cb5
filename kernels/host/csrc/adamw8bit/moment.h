// A moment on its way back to 8 bits, with the vectors of one instruction set.
#pragma once

#include "elementwise.h"

namespace leapalign::LEAPALIGN_ISA {

// One moment of a block, from its update until it is encoded. Values are in the order of the groups' vectors.
template <bool kSigned>
struct Moment {
    alignas(64) float values[kBlock];
    Doubt doubts[kBlock / kGroup];
    uint8_t *codes;
    float inverse;         // of the largest
    float factor;          // the inverse as the encoder takes it
    bool waiting = false;  // to be encoded

    // Takes a block of zeros, and what lines are not for: one that is too large, or not finite.
    void close(const Map &map, uint32_t peak, uint8_t *to, float *absmax) {
        const float largest = float_of(peak);
        *absmax = largest;
        codes = to;
        inverse = 1.0f / (peak > 0x00800000u ? largest : 0x1p-126f);
        factor = Encoder<kSigned>::factor_of(map, inverse);
        waiting = peak != 0 && peak <= kLargestPeak;
        if (peak == 0) std::memset(codes, kSigned ? 127 : 0, kBlock);
        if (peak > kLargestPeak) {
            for (size_t i = 0; i < kBlock; ++i) settle(map, i);
        }
    }

    // The largest magnitude, nan above infinity.
    LEAPALIGN_NOINLINE_METHOD uint32_t exact_peak() const {
        uint32_t peak = 0;
        for (const float value : values) {
            const uint32_t magnitude = bits_of(value) & 0x7FFFFFFFu;
            peak = magnitude > peak ? magnitude : peak;
        }
        return peak;
    }

    LEAPALIGN_METHOD void encode(const Encoder<kSigned> &encoder, size_t i) {
        doubts[i / kGroup] = encoder.encode(values + i, spread(factor), codes + i);
    }

    LEAPALIGN_METHOD void settle(const Map &map, size_t i) const {
        const uint8_t code = map.code(values[i] * inverse);
        codes[i - i % kGroup + element_of(i % kGroup)] = !kSigned && code == 0 ? uint8_t{1} : code;
    }

    // Looks up the codes of the elements in doubt.
    LEAPALIGN_METHOD void settle(const Encoder<kSigned> &encoder, const Map &map) const {
        Doubt all;
        for (const Doubt &doubt : doubts) all.include(doubt);
        if (all.elements()) settle_elements(encoder, map);
    }

    LEAPALIGN_NOINLINE_METHOD void settle_elements(const Encoder<kSigned> &encoder, const Map &map) const {
        for (size_t i = 0; i < kBlock; i += kWidth) {
            if (!doubts[i / kGroup].elements()) continue;
            Doubt doubt;
            doubt.include(encoder.places(values + i, spread(factor)));
            uint32_t elements = doubt.elements();
            for (size_t j = i; elements; ++j, elements >>= 1) {
                if (elements & 1) settle(map, j);
            }
        }
    }
};

}  // namespace leapalign::LEAPALIGN_ISA
