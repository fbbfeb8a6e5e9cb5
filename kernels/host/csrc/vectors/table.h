// The table of one instruction set's kernels: the end of each isa_*.cpp, which is compiled for it alone. All that it
// includes is in a namespace of its own, so that the linker never takes a function of another set for this one's.
#pragma once

#include "adamw8bit/adamw8bit.h"
#include "reduction.h"

#define LEAPALIGN_STRING(text) #text
#define LEAPALIGN_NAME(isa) LEAPALIGN_STRING(isa)

namespace leapalign::LEAPALIGN_ISA {

const Kernels kernels = {
    LEAPALIGN_NAME(LEAPALIGN_ISA), adamw8bit, finite, finite_factors, round_stochastic, chunk_sums, accumulate, ema,
};

}  // namespace leapalign::LEAPALIGN_ISA
