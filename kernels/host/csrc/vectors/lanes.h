// The order in which vectors hold the elements of a group, four vectors' worth of consecutive ones. Packing and unpacking
// instructions work within lanes of 128 bits. With each lane of a vector holding four neighbours, one of them widens 8
// codes or bf16 numbers, or narrows them, and nothing has to cross lanes.
#pragma once

#include "portable.h"

namespace leapalign {

// The element of its group that is at `position` among the vectors of `width`: of 2 x width consecutive elements, one
// vector has four of each eight and the other one the other four.
template <size_t width>
LEAPALIGN_INLINE size_t element_at(size_t position) {
    constexpr size_t lane = width < 4 ? width : 4;
    const size_t pair = position / (2 * width), second = position / width % 2, within = position % width;
    return 2 * width * pair + 2 * lane * (within / lane) + lane * second + within % lane;
}

}  // namespace leapalign
