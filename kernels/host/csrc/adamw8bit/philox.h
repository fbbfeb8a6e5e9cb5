// Philox4x32-7 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for many counters
// that differ in their lowest word: what is the same for all of them is computed once.
#pragma once

#include "kernels.h"

namespace leapalign {

constexpr size_t kDrawsPerCounter = 8;
constexpr size_t kRounds = 7;

// The words are (counter, high, parameter, step). A round makes of words 0..3 and keys 0, 1
//     (upper(C w2) ^ w1 ^ key0, lower(C w2), upper(A w0) ^ w3 ^ key1, lower(A w0)).
// In the first one C w2 is constant, in the second one A w0. Each constant is `lanes` times there, in 64 bits each: it is
// an operand in memory of the instruction that needs it, of which no register is taken.
template <size_t lanes>
struct Philox {
    struct alignas(8 * lanes) Word {
        uint64_t copies[lanes];

        LEAPALIGN_METHOD void operator=(uint32_t word) {
            for (size_t i = 0; i < lanes; ++i) copies[i] = word;
        }
        LEAPALIGN_METHOD uint32_t value() const { return static_cast<uint32_t>(copies[0]); }
    };

    uint64_t high;  // the upper half of the counters
    Word third1;    // round 1, with upper(A w0)
    Word first2;    // round 2, with upper(C w2)
    Word third2;    // round 2, with lower(A w0) of round 1
    Word third3;    // round 3, with upper(A w0)
    Word keys[2 * kRounds - 5];  // key0 of round 3, both keys of the rounds from 4

    LEAPALIGN_METHOD Philox(const Stream &stream, uint64_t upper) : high(upper) {
        uint32_t key0 = static_cast<uint32_t>(stream.seed), key1 = static_cast<uint32_t>(stream.seed >> 32);
        const auto next = [&] { key0 += kPhiloxKey0, key1 += kPhiloxKey1; };
        const uint64_t product = uint64_t{kPhiloxC} * stream.parameter;
        const uint32_t first1 = static_cast<uint32_t>(product >> 32) ^ static_cast<uint32_t>(upper) ^ key0;
        const uint64_t product2 = uint64_t{kPhiloxA} * first1;
        third1 = stream.step ^ key1;
        next();
        first2 = static_cast<uint32_t>(product) ^ key0;
        third2 = static_cast<uint32_t>(product2 >> 32) ^ key1;
        next();
        third3 = static_cast<uint32_t>(product2) ^ key1;
        keys[0] = key0;
        for (size_t i = 1; i < 2 * kRounds - 5; i += 2) {
            next();
            keys[i] = key0;
            keys[i + 1] = key1;
        }
    }
};

}  // namespace leapalign
