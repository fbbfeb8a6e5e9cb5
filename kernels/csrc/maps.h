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
    float decoded[256];       // what a step starts from: the values; in the unsigned map, of the root, their squares
    float edges[256];         // the largest float that still has a lower code; -inf for code 0
    uint8_t lowest[1 << 16];  // of the floats with these upper 16 bits, the lowest code

    float slope[8], offset[8];  // of each slot's line; the offset includes kMargin
    float cap[8];               // half a place below the first one of the next slot
    float above[8];             // the largest |y| in the slot
    // The |y| exactly between the last place of a slot and the first of the next, inf if there is none: with equal
    // distances the lower code has the lower place or, where y < 0, the higher one, so that it is to be looked up.
    float tie;

    // For |y| >= 2^-29, by its bits from 24 up, modulo 16: of the slot in which such a range, [4^k, 4^(k+1)) / 2, begins.
    // In none there is more than one slot's end, and after one the next range begins in the next slot.
    float range_slope[16], range_offset[16], range_cap[16];
    float range_above[16];  // the largest |y| in the slot, if that ends in the range

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

// Encoders compute places in units of 2^-16. Those that are nearer to an integer than kMargin, one of 8192, are decided by
// Map::code.
constexpr float kUnit = 0x1p16f;
constexpr uint32_t kDoubt = 8;
static_assert(2 * kMargin * kUnit == kDoubt);

// Signed places and 2^23 share a float, whose bits have the integer part in the upper half, added to kBaseUpper. The two
// roundings to units that this adds, 256 in the reckoning above, fit: with 128 places the other terms are halved.
constexpr float kBase = 0x1p23f;
constexpr int kBaseUpper = 0x4B00;

// The upper half of the bits of |y| >= kSmallest, times kSlotFactor and shifted: log10 |y| + 38.23, within 0.03, rounded
// down. Modulo 8 that is the slot or one less: of the slot's decade it increases at 0.77, and slots end before 0.31.
constexpr int kSlotFactor = 19728, kSlotShift = 23;  // 0.30103 / 128
constexpr float kSmallest = 1e-6f / 8;  // what is smaller has the same code

const Map &signed_map();
const Map &unsigned_map();

}  // namespace leapalign
