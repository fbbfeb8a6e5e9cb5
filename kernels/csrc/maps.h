// The 8-bit maps of kernels/quantize.py, and what the encoders look up. One instance each, made when first used.
#pragma once

#include "portable.h"

namespace leapalign {

constexpr size_t kBlock = 256;  // elements that share an absmax

// Codes count from 0; a "place" is the index of a magnitude: the code in the unsigned map, code - 127 in the signed one.
// Within a decade the boundaries between places lie on a line, place = slope |y| + offset, up to rounding errors. A slot
// is a decade, or the value 1; the lowest decade's holds 0 too.
struct Map {
    bool is_signed;
    float values[256];
    float edges[256];         // the largest float that still has a lower code; -inf for code 0
    uint8_t lowest[1 << 16];  // of the floats with these upper 16 bits, the lowest code

    float slope[8], offset[8];  // of each slot's line; the offset includes kMargin
    float cap[8];               // half a place below the first one of the next slot
    float above[8];             // the largest |y| in the slot
    // The |y| exactly between the last place of a slot and the first of the next, inf if there is none: with equal
    // distances the lower code has the lower place or, where y < 0, the higher one, so that it is to be looked up.
    float tie;
    float exponent_slope[32], exponent_offset[32], exponent_cap[32], exponent_above[32];  // for exponents 2^-31 .. 2^0

    // Values as lines over the number of the magnitude, f = |code - 127| in the signed map and code + 1 in the unsigned
    // one, for each exponent of f (modulo 16): the value has the bits of fma(f, value_slope, value_offset) and fixes more,
    // four bits for each code.
    float value_slope[16], value_offset[16];
    uint32_t fixes[32];

    // The code of y by the definition: for any y, nan included.
    LEAPALIGN_METHOD uint8_t code(float y) const {
        const uint32_t bits = bits_of(y);
        if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 255;
        uint8_t found = lowest[bits >> 16];
        while (found < 255 && edges[found + 1] < y) ++found;
        return found;
    }
};

// A line's place is within kMargin of the exact one: at 256 places a decade's width of 0.9, in units of 2^-24: half a
// place's last bit (128) for the product, as much for the slope, 57 for the offset, 213 for the map's values, each
// within 1.5 of its ideal, and 142 for rounding a boundary down: 668 in all, 2^-14.6.
constexpr float kMargin = 0x1p-14f;

// Places that are nearer to an integer than kMargin are decided by Map::code: one of 8192.
constexpr float kDoubt = 2 * kMargin;

// Slot of |y| >= 2^-31 is trunc(kSlotScale * (its bits) + kSlotOffset), or one more: log10 |y| + 6.4, within 0.03.
constexpr float kSlotScale = 0.30103f / 8388608.0f;
constexpr float kSlotOffset = 6.4f - 127.0f * 0.30103f;
constexpr float kSmallest = 1e-6f / 8;  // what is smaller has the same code and a slot of at least 0

const Map &signed_map();
const Map &unsigned_map();

}  // namespace leapalign
