#include "adamw8bit/maps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace leapalign {
namespace {

// quantize._dynamic_map: the steps in double are exact but for the one rounding to float that each line does.
void fill_values(Map &map) {
    const float low = 0.1f, high = 1.0f;
    std::vector<float> values{0.0f, 1.0f};
    for (int decade = 0; decade < 7; ++decade) {
        const int parts = map.is_signed ? 1 << decade : 2 << decade;
        const double step = static_cast<float>(static_cast<float>(double{high} - low) / parts);
        const auto edge = [&](int k) {
            return static_cast<float>(k < (parts + 1) / 2 ? low + k * step : high - (parts - k) * step);
        };
        const float power = static_cast<float>(std::pow(10.0, decade - 6));
        for (int k = 0; k < parts; ++k) {
            const float middle = static_cast<float>((double{edge(k)} + edge(k + 1)) / 2);
            const float value = static_cast<float>(double{power} * middle);
            values.push_back(value);
            if (map.is_signed) values.push_back(-value);
        }
    }
    std::sort(values.begin(), values.end());
    std::copy(values.begin(), values.end(), map.values);
    for (int code = 0; code < 256; ++code) map.decoded[code] = map.is_signed ? values[code] : values[code] * values[code];
    map.edges[0] = -std::numeric_limits<float>::infinity();
    for (int code = 1; code < 256; ++code) {
        const double middle = (double{map.values[code - 1]} + map.values[code]) / 2;  // exact
        float rounded = static_cast<float>(middle);
        if (rounded > middle) rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
        map.edges[code] = rounded;
    }
}

void fill_lowest(Map &map) {
    for (uint32_t upper = 0; upper < 1 << 16; ++upper) {
        const bool negative = upper >> 15;
        const float lowest = float_of(upper << 16 | (negative ? 0xFFFFu : 0));
        const auto found = std::lower_bound(map.edges + 1, map.edges + 256, lowest);  // the first edge not below it
        map.lowest[upper] = static_cast<uint8_t>(found - map.edges - 1);
    }
}

void fill_lines(Map &map) {
    const int zero = map.is_signed ? 127 : 0;
    const double last = map.edges[255], scale = kLastRange * (1 + 0x1p-21) / (last + kShift);  // above it by the errors
    map.scale = static_cast<float>(scale);
    map.shift = static_cast<float>(scale * kShift);
    for (int slot = 0; slot < 8; ++slot) {
        const int parts = map.is_signed ? 1 << slot : 2 << slot;
        const int start = map.is_signed ? parts : parts - 1, end = slot < 7 ? start + parts : start + 1;  // places
        double slope = std::pow(10.0, 6 - slot) * parts / 0.9, offset = start - parts / 9.0, later = 0.75 * end - 0.25;
        if (slot == 0) {  // from 0 or 1 up to the next place, and what is later from there
            const double first = map.edges[zero + end - 1], second = map.edges[zero + end];
            if (!map.is_signed) slope = 0.9 / first;
            offset = end - 1 - slope * first;
            later = end - 0.25 * (slope * second + offset);
        } else if (slot == 7) {  // the value 1
            slope *= 5;  // that of the slot before
            offset = start - slope * last;
        }
        for (int entry = (range_of(kLastRange) + slot + 1) % 8; entry < 16; entry += 8) {
            map.slope[entry] = static_cast<float>(slope / scale);
            map.offset[entry] = static_cast<float>(offset - slope * kShift + kMargin);
            map.later[entry] = static_cast<float>(later + 0.75 * kMargin);
        }
    }
}

struct Line {
    float slope, offset;

    // Units in the last place from the line up to the value: the least and the most for f = first .. last.
    std::pair<int32_t, int32_t> missing(const float *values, int first, int last) const {
        int32_t least = std::numeric_limits<int32_t>::max(), most = std::numeric_limits<int32_t>::min();
        for (int f = first; f <= last; ++f) {
            const float on_line = std::fma(static_cast<float>(f), slope, offset);
            const int32_t units = static_cast<int32_t>(bits_of(values[f])) - static_cast<int32_t>(bits_of(on_line));
            least = std::min(least, units), most = std::max(most, units);
        }
        return {least, most};
    }
};

// The line below values[first .. last] that is nearest to them: of the smallest of them, a unit is an eighth of what it is
// of the largest and of the offset, which is negative and as large. Among some slopes around the mean one there is one
// that none of the values is more than six units above.
Line line_below(const float *values, int first, int last) {
    if (first == last) return {0.0f, values[first]};
    const float mean = (values[last] - values[first]) / static_cast<float>(last - first);
    Line best{};
    int32_t most = std::numeric_limits<int32_t>::max();
    for (int tried = -8; tried <= 8; ++tried) {
        const float slope = float_of(bits_of(mean) + static_cast<uint32_t>(tried));
        Line line{slope, std::fma(-slope, static_cast<float>(first), values[first])};
        for (int step = 0; step < 16; ++step) line.offset = std::nextafter(line.offset, 1.0f);
        while (line.missing(values, first, last).first < 0) line.offset = std::nextafter(line.offset, -1.0f);
        const int32_t found = line.missing(values, first, last).second;
        if (found < most) most = found, best = line;
    }
    if (most > 15) throw std::logic_error("a value of the map is too far from its line");
    return best;
}

void fill_value_lines(Map &map) {
    std::fill(map.value_slope, map.value_slope + 16, 0.0f);
    std::fill(map.value_offset, map.value_offset + 16, 0.0f);
    std::fill(map.fixes, map.fixes + 32, 0u);
    const int zero = map.is_signed ? 127 : -1;  // f is code - zero; the unsigned map's f = 1 is the value 0
    const int end = map.is_signed ? 128 : 256;
    const float *const values = map.values + 127;  // of the signed map's f
    float shifted[257];                            // of the unsigned one's
    std::copy(map.values, map.values + 256, shifted + 1);
    for (int first = map.is_signed ? 1 : 2, entry = map.is_signed ? 15 : 0; first <= end; first *= 2, ++entry) {
        const int last = first < end ? 2 * first - 1 : first;
        const float *const of = map.is_signed ? values : shifted;
        const Line line = line_below(of, first, last);
        map.value_slope[entry % 16] = line.slope;
        map.value_offset[entry % 16] = line.offset;
        for (int f = first; f <= last; ++f) {
            const uint32_t fix = static_cast<uint32_t>(line.missing(of, f, f).first);
            const int code = zero + f, opposite = zero - f;
            map.fixes[code / 8] |= fix << (4 * (code % 8));
            if (map.is_signed && opposite >= 0) map.fixes[opposite / 8] |= fix << (4 * (opposite % 8));
        }
    }
}

std::unique_ptr<const Map> make(bool is_signed) {
    auto map = std::make_unique<Map>();
    map->is_signed = is_signed;
    fill_values(*map);
    fill_lowest(*map);
    fill_lines(*map);
    fill_value_lines(*map);
    return map;
}

}  // namespace

const Map &signed_map() {
    static const std::unique_ptr<const Map> map = make(true);
    return *map;
}

const Map &unsigned_map() {
    static const std::unique_ptr<const Map> map = make(false);
    return *map;
}

}  // namespace leapalign
