// Stochastic rounding of fp32 to bf16 with counter-based random bits. kernels/rounding.py holds the definition and the
// reference in torch; both give the same bits. Reads 4 bytes and writes 2 for each element.
#pragma once

#include "portable.h"

namespace leapalign {

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on a tile of
// consecutive counters, as arrays so that the compiler vectorises over the counters.
constexpr size_t kTileBlocks = 64;                   // 2 KiB of state and draws: stays in the first-level cache
constexpr size_t kDrawsPerBlock = 8;                 // four words of 32 bits are eight draws of 16 bits
constexpr size_t kTileDraws = kTileBlocks * kDrawsPerBlock;

struct Stream {
    uint64_t seed;
    uint32_t step;
    uint32_t parameter;
};

LEAPALIGN_INLINE void philox_tile(const Stream &stream, uint64_t first_block,
                                  uint16_t *draws  // (kTileDraws,)
) {
    uint32_t c0[kTileBlocks], c1[kTileBlocks], c2[kTileBlocks], c3[kTileBlocks];
    for (size_t i = 0; i < kTileBlocks; ++i) {
        const uint64_t block = first_block + i;
        c0[i] = static_cast<uint32_t>(block);
        c1[i] = static_cast<uint32_t>(block >> 32);
        c2[i] = stream.parameter;
        c3[i] = stream.step;
    }
    uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (size_t i = 0; i < kTileBlocks; ++i) {
            const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
            c1[i] = static_cast<uint32_t>(p1);
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
            c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (size_t i = 0; i < kTileBlocks; ++i) {  // words in order, the low half first
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        for (size_t w = 0; w < 4; ++w) {
            draws[kDrawsPerBlock * i + 2 * w] = static_cast<uint16_t>(words[w]);
            draws[kDrawsPerBlock * i + 2 * w + 1] = static_cast<uint16_t>(words[w] >> 16);
        }
    }
}

// Up in magnitude in exactly (low 16 bits) of the 65,536 draws. nan stays nan, inf stays inf, finite stays finite.
LEAPALIGN_INLINE uint16_t round_stochastic(uint32_t bits, uint16_t draw) {
    const uint32_t magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
    const uint32_t limit = magnitude == 0x7F800000u ? 0x7F80u : 0x7F7Fu;
    uint32_t rounded = (magnitude + draw) >> 16;
    rounded = rounded < limit ? rounded : limit;
    rounded = magnitude > 0x7F800000u ? (magnitude >> 16) | 0x40u : rounded;
    return static_cast<uint16_t>(sign | rounded);
}

// Tiles [first, last) of the flat index range that starts at `offset`. Integer arithmetic: the same bits in all clones.
LEAPALIGN_CLONES
inline void round_tiles(const float *x,     // (count,)
                        uint16_t *out,      // (count,) bf16
                        size_t count, uint64_t offset, Stream stream, size_t first, size_t last) {
    uint16_t draws[kTileDraws];
    const uint64_t end = offset + count;
    for (size_t tile = first; tile < last; ++tile) {
        const uint64_t block = offset / kDrawsPerBlock + tile * kTileBlocks;
        const uint64_t tile_begin = block * kDrawsPerBlock, tile_end = tile_begin + kTileDraws;
        const uint64_t lo = tile_begin > offset ? tile_begin : offset, hi = tile_end < end ? tile_end : end;
        philox_tile(stream, block, draws);
        const float *source = x + (lo - offset);
        uint16_t *target = out + (lo - offset);
        const uint16_t *draw = draws + (lo - tile_begin);
        const size_t length = static_cast<size_t>(hi - lo);
        for (size_t i = 0; i < length; ++i) target[i] = round_stochastic(bits_of(source[i]), draw[i]);
    }
}

inline void round_array(const float *x, uint16_t *out, size_t count, uint64_t offset, Stream stream, size_t threads) {
    if (count == 0) return;
    const size_t tiles = (offset % kDrawsPerBlock + count + kTileDraws - 1) / kTileDraws;
    parallel_for(tiles, threads, 256, [=](size_t first, size_t last) {
        round_tiles(x, out, count, offset, stream, first, last);
    });
}

}  // namespace leapalign
