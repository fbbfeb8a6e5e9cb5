// The 8-bit maps of kernels/adamw8bit/quantize.py, and what the encoders look up. One instance each, made when first used.
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

    // size = scale |y| + shift has a range, see range_of, for each slot: it begins above the end of the slot before, and
    // that of the value 1 at this end. By ranges modulo 8, twice: the slots' lines over the size; offsets include kMargin.
    float scale, shift;
    float slope[16], offset[16];
    // A slot ends two of its widths above its last boundary, and four above that is the next slot's first one; then they
    // are five apart. The first two are on the line place = slot's / 4 + later, which is the lower one from there. A width
    // before the third, it is a place ahead: by then, the next range has begun.
    float later[16];

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

// A line's place is within kMargin of the exact one: at 256 places a decade's width of 0.9, in units of 2^-24, 128 for
// rounding the place, 80 for its slope, 64 for its offset, 114 for rounding the size, 142 for its factor and 71 because y
// is rounded, 213 for the map's values, each within 1.5 of its ideal, and 142 for rounding a boundary down: 954 in all,
// 2^-14.1. What is on the later line has at most 129 places and a quarter of its slot's errors.
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

// A range is the upper half of the bits of a size, times kRangeFactor and shifted: logarithms to the base 8.8, rounded
// down. Range 40 begins at kLastRange, that of the value 1, and the seven below it where Map wants it, for both maps, 0.9%
// from where they may not. With kShift added to |y|, none is lower.
constexpr int kRangeFactor = 20932, kRangeShift = 23;
constexpr float kLastRange = 0x1.3ep-2f, kShift = 0x1.2p-22f;

LEAPALIGN_INLINE int range_of(float size) {
    return static_cast<int>(bits_of(size) >> 16) * kRangeFactor >> kRangeShift;
}

// Of larger blocks, the scaled inverse may be subnormal, with fewer bits.
constexpr uint32_t kLargestPeak = 0x7D800000;  // 2^124

const Map &signed_map();
const Map &unsigned_map();

}  // namespace leapalign
