// What differs between compilers and processors, in one place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(_MSC_VER)
#define LEAPALIGN_INLINE __forceinline
#else
#define LEAPALIGN_INLINE inline __attribute__((always_inline))
#endif

// One clone of a function for each instruction set, chosen when the module is loaded: a portable wheel that still uses
// the wide units. Needs ifunc, which glibc has. The results are the same in every clone (see the functions that use it).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define LEAPALIGN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef LEAPALIGN_CLONES
#define LEAPALIGN_CLONES
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

// Calls work(begin, end) on disjoint ranges that cover [0, count), at most `threads` of them and none under `grain`
// items (a thread costs about 20 us). work must not throw, and its result must not depend on where the ranges are cut.
template <typename Work>
void parallel_for(size_t count, size_t threads, size_t grain, const Work &work) {
    const size_t useful = (count + grain - 1) / grain;
    const size_t parts = threads < useful ? threads : useful;
    if (parts <= 1) {
        work(size_t{0}, count);
        return;
    }
    std::vector<std::thread> pool;
    pool.reserve(parts - 1);
    size_t begin = 0;
    for (size_t part = 0; part + 1 < parts; ++part) {
        const size_t end = begin + (count - begin) / (parts - part);
        try {
            pool.emplace_back([&work, begin, end] { work(begin, end); });
        } catch (const std::system_error &) {
            break;  // the process may have no more threads: the rest is done here
        }
        begin = end;
    }
    work(begin, count);
    for (std::thread &thread : pool) thread.join();
}

}  // namespace leapalign
