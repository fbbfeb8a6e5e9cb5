// What differs between compilers and processors, in one place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define LEAPALIGN_INLINE static __forceinline
#define LEAPALIGN_METHOD __forceinline
#define LEAPALIGN_NOINLINE static __declspec(noinline)
#define LEAPALIGN_NOINLINE_METHOD __declspec(noinline)
#define LEAPALIGN_RESTRICT __restrict
#else
#define LEAPALIGN_INLINE static inline __attribute__((always_inline))
#define LEAPALIGN_METHOD inline __attribute__((always_inline))
#define LEAPALIGN_NOINLINE static __attribute__((noinline))
#define LEAPALIGN_NOINLINE_METHOD __attribute__((noinline))
#define LEAPALIGN_RESTRICT __restrict__
#endif

#if defined(_MSC_VER)
#define LEAPALIGN_FETCH(address) ((void)(address))
#else
#define LEAPALIGN_FETCH(address) __builtin_prefetch(address)
#endif

// Keeps a compiler from gathering such values in a vector: that takes more instructions than it saves.
#if defined(__GNUC__)
#define LEAPALIGN_SCALAR(value) __asm__("" : "+r"(value))
// Keeps a compiler from making a constant anew wherever it is needed: that takes the permutations' port, loads do not.
#define LEAPALIGN_KEPT(vector) __asm__("" : "+v"(vector))
#define LEAPALIGN_UNROLL _Pragma("GCC unroll 32")
#else
#define LEAPALIGN_SCALAR(value)
#define LEAPALIGN_KEPT(vector)
#define LEAPALIGN_UNROLL
#endif

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#define LEAPALIGN_HAS_MXCSR 1
#endif

namespace leapalign {

LEAPALIGN_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

LEAPALIGN_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// While one lives, its thread rounds to nearest and keeps subnormals, as the references do, whatever was set before
// (torch.set_flush_denormal, a library built with -ffast-math); then that holds again.
class [[maybe_unused]] ExactFloats {
public:
#if defined(LEAPALIGN_HAS_MXCSR)
    ExactFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
    ~ExactFloats() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__) && defined(__GNUC__)
    ExactFloats() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before_));
        __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
    }
    ~ExactFloats() { __asm__ volatile("msr fpcr, %0" : : "r"(before_)); }

private:
    uint64_t before_;
#endif
};

}  // namespace leapalign
