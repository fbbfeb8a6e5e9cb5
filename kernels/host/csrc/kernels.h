// The kernels of one instruction set, each a loop over a range that one thread does. Every set gives the same bits.
#pragma once

#include "adamw8bit/maps.h"
#include "portable.h"

namespace leapalign {

// Whose random bits: kernels/rounding.py.
struct Stream {
    uint64_t seed;
    uint32_t step;
    uint32_t parameter;
};

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxC = 0xCD9E8D57u;        // multiply words 0 and 2
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;  // added to the key each round

constexpr uint64_t kAverageStream = uint64_t{1} << 61;  // rounding.AVERAGE_STREAM

// A buffer of fp32 or bf16.
struct Floats {
    void *data = nullptr;
    bool bf16 = false;

    LEAPALIGN_METHOD explicit operator bool() const { return data != nullptr; }
    LEAPALIGN_METHOD float *fp32() const { return static_cast<float *>(data); }
    LEAPALIGN_METHOD uint16_t *half() const { return static_cast<uint16_t *>(data); }
};

// left^T right: the gradient of a matrix as a sum of outer products, in order of the terms.
struct Factors {
    Floats left;   // (terms, rows)
    Floats right;  // (terms, cols)
    size_t terms = 0, rows = 0, cols = 0;
};

// The arguments of adamw8bit.update, and its scalars as they are rounded to fp32.
struct Run {
    size_t count;   // n
    uint64_t first;
    Stream stream;
    Floats weights;   // (n,)
    Floats gradient;  // (n,), or none: factors
    Factors factors;
    uint8_t *codes_m;  // (n,)
    uint8_t *codes_v;  // (n,)
    float *absmax_m;   // (ceil(n / 256),)
    float *absmax_v;   // (ceil(n / 256),)
    int8_t *residual;  // (n,), or none
    float *master;     // (n,), or none
    Floats ema;        // (n,), or none
    float gain, decay_m, decay_root, unit, root_gain, eps, decay_w, gain_ema;
};

struct Kernels {
    const char *name;
    void (*adamw8bit)(const Run &, size_t first_block, size_t last_block);
    bool (*finite)(Floats x, size_t begin, size_t end);
    bool (*finite_factors)(const Run &, size_t first_block, size_t last_block);  // of the products and their sums
    void (*round_stochastic)(const float *x, uint16_t *out, uint64_t offset, Stream, size_t begin, size_t end);
    void (*chunk_sums)(Floats x, size_t count, double *sums, size_t first_chunk, size_t last_chunk);
    void (*accumulate)(Floats sum, Floats x, size_t begin, size_t end);
    void (*ema)(Floats average, Floats weights, float gain, uint64_t offset, Stream, size_t begin, size_t end);
};

constexpr size_t kChunk = 4096;  // elements that one partial sum of squares covers

namespace scalar {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512bw {  // F, BW, DQ and VL
extern const Kernels kernels;
}
namespace avx512 {  // VBMI too
extern const Kernels kernels;
}

}  // namespace leapalign
