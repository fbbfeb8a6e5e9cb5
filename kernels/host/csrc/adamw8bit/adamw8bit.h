// One step of AdamW with 8-bit moments over blocks of 256 elements, bit for bit kernels/adamw8bit/definition.py, which has the
// equations, the formats and the order of the operations. Nothing here may be contracted to fused multiply-adds but the
// guess of a place in the map, which decides nothing where that could matter.
//
// Three blocks are in work at once: the codes of the next are looked up (load units), this one is updated (divider), and
// the new moments of the one before, whose largest are known by then, are encoded (multipliers and permutations).
#pragma once

#include "adamw8bit/block.h"
#include "adamw8bit/moment.h"
#include "adamw8bit/rounding.h"

namespace leapalign::LEAPALIGN_ISA {

enum class Format { fp32, stochastic, residual, master };

template <typename Scalar>
LEAPALIGN_INLINE void add_scaled(float *LEAPALIGN_RESTRICT sum, float factor, const Scalar *LEAPALIGN_RESTRICT x, size_t count) {
    for (size_t i = 0; i < count; ++i) sum[i] += factor * widened(x[i]);
}

// A block of left^T right, adamw8bit_triton.expand: from zero, in order of the terms, products and sums rounded.
void expand(const Run &run, size_t block, float *gradient  // (256,)
) {
    const Factors &factors = run.factors;
    const size_t begin = block * kBlock, end = begin + length_of(run, block);
    std::memset(gradient, 0, kBlock * sizeof(float));
    for (size_t from = begin; from < end;) {
        const size_t row = from / factors.cols, col = from % factors.cols;
        const size_t length = end - from < factors.cols - col ? end - from : factors.cols - col;
        for (size_t term = 0; term < factors.terms; ++term) {
            const size_t left = term * factors.rows + row, right = term * factors.cols + col;
            const float factor = factors.left.bf16 ? widened(factors.left.half()[left]) : factors.left.fp32()[left];
            if (factors.right.bf16) {
                add_scaled(gradient + (from - begin), factor, factors.right.half() + right, length);
            } else {
                add_scaled(gradient + (from - begin), factor, factors.right.fp32() + right, length);
            }
        }
        from += length;
    }
    for (size_t i = end - begin; i < kBlock; ++i) gradient[i] = gradient[0];  // as Copy fills it up
}

bool finite_factors(const Run &run, size_t first, size_t last) {
    alignas(64) float gradient[kBlock];
    for (size_t block = first; block < last; ++block) {
        expand(run, block, gradient);
        if (!all_finite(gradient, kBlock)) return false;
    }
    return true;
}

template <Format kFormat>
void steps(const Run &run, size_t first, size_t last) {
    const Map &map_m = signed_map(), &map_v = unsigned_map();
    static const Decoder<true> decoder_m(map_m);  // tables of 1.5 KiB
    static const Decoder<false> decoder_v(map_v);
    const Encoder<true> encoder_m(map_m);
    const Encoder<false> encoder_v(map_v);
    const Vector gain = spread(run.gain), root_gain = spread(run.root_gain), eps = spread(run.eps);
    const Vector decay_w = spread(run.decay_w);
    constexpr bool kDirect = kFormat == Format::fp32 || kFormat == Format::stochastic;

    alignas(64) float decoded_m[2][kBlock], decoded_v[2][kBlock];  // q and q^2 of the map, in the order of the vectors
    alignas(64) float expanded[kBlock], weights[kBlock];
    alignas(64) uint16_t draws[kBlock];
    Draws philox(run.stream, 0);
    Moment<true> moments[2];
    Moment<false> roots[2];
    Copy copy;
    Block now{}, next{}, tail{};

    const auto open = [&](size_t block) {
        Block found = block_of(run, block);
        if (length_of(run, block) < kBlock) {
            tail = found;
            found = copy.fill(found, length_of(run, block));
        }
        return found;
    };
    next = open(first);
    for (size_t i = 0; i < kBlock; i += kGroup) {
        decoder_m.decode(next.codes_m + i, decoded_m[first % 2] + i);
        decoder_v.decode(next.codes_v + i, decoded_v[first % 2] + i);
    }
    for (size_t block = first; block <= last; ++block) {
        const bool updates = block < last, decodes = block + 1 < last;
        const size_t here = block % 2, other = 1 - here;
        Moment<true> &moment = moments[here], &old_moment = moments[other];
        Moment<false> &root = roots[here], &old_root = roots[other];
        Vector before_m{}, before_v{};
        Peak peak_m;
        UnsignedPeak peak_v;
        now = next;
        if (decodes) next = open(block + 1);
        if (block + 2 < last) fetch(run, block + 2);
        if (updates) {
            const float root_before = run.absmax_v[block] * run.decay_root;
            before_m = spread(run.absmax_m[block] * run.decay_m);
            before_v = spread(root_before * root_before);
            if (!run.gradient) {
                expand(run, block, expanded);
                now.gradient = {expanded, false};
            }
            if (kFormat == Format::residual) {
                for (size_t i = 0; i < kBlock; ++i) weights[i] = joined(now.weights.half()[i], now.residual[i]);
            }
        }

        const Floats gradient = now.gradient;
        uint16_t *const half = now.weights.half();
        float *const full = kFormat == Format::fp32     ? now.weights.fp32()
                            : kFormat == Format::master ? now.master
                                                        : weights;
        const float *const was_m = decoded_m[here], *const was_v = decoded_v[here];
        float *const next_m = decoded_m[other], *const next_v = decoded_v[other];
        if (kFormat == Format::stochastic && updates) {
            const uint64_t counter = (run.first + block * kBlock) / kDrawsPerCounter;
            if (philox.high != counter >> 32) philox = Draws(run.stream, counter >> 32);
            draw_block(philox, counter, draws);
        }

        const auto update_moments = [&](size_t group) {
            Vector h[4], m[4], r[4];
            for (size_t i = 0; i < 4; i += 2) {
                const size_t from = group + kWidth * i;
                const Pair g = gradient.bf16 ? load_pair(gradient.half() + from) : load_pair(gradient.fp32() + from);
                h[i] = mul(g.first, gain), h[i + 1] = mul(g.second, gain);
            }
            for (size_t i = 0; i < 4; ++i) r[i] = mul(load(was_v + group + kWidth * i), before_v);
            for (size_t i = 0; i < 4; ++i) r[i] = root_of(add(r[i], mul(h[i], h[i])));
            for (size_t i = 0; i < 4; ++i) m[i] = add(mul(load(was_m + group + kWidth * i), before_m), h[i]);
            for (size_t i = 0; i < 4; ++i) {
                store(moment.values + group + kWidth * i, m[i]);
                peak_m.include(m[i]);
            }
            for (size_t i = 0; i < 4; ++i) {
                store(root.values + group + kWidth * i, r[i]);
                peak_v.include(r[i]);
            }
        };
        const auto update_weights = [&](size_t group) {
            Vector w[4], moved[4];
            for (size_t i = 0; i < 4; ++i) moved[i] = mul(load(root.values + group + kWidth * i), root_gain);
            for (size_t i = 0; i < 4; ++i) moved[i] = div(load(moment.values + group + kWidth * i), add(moved[i], eps));
            for (size_t i = 0; i < 4; i += 2) {
                const size_t from = group + kWidth * i;
                const Pair pair = kFormat == Format::stochastic ? load_pair(half + from) : load_pair(full + from);
                w[i] = sub(mul(pair.first, decay_w), moved[i]);
                w[i + 1] = sub(mul(pair.second, decay_w), moved[i + 1]);
                if (kFormat != Format::stochastic) store_pair(full + from, {w[i], w[i + 1]});
            }
            if (kFormat == Format::stochastic) store_stochastic(half + group, w, draws + group);
        };

        if (updates && decodes && old_moment.waiting && old_root.waiting) {
            for (size_t i = 0; i < kBlock; i += kGroup) {
                decoder_m.decode(next.codes_m + i, next_m + i);
                update_moments(i);
            }
            for (size_t i = 0; i < kBlock; i += kGroup) {
                decoder_v.decode(next.codes_v + i, next_v + i);
                update_weights(i);
                old_moment.encode(encoder_m, i);
                old_root.encode(encoder_v, i);
            }
        } else {
            for (size_t i = 0; decodes && i < kBlock; i += kGroup) {
                decoder_m.decode(next.codes_m + i, next_m + i);
                decoder_v.decode(next.codes_v + i, next_v + i);
            }
            for (size_t i = 0; updates && i < kBlock; i += kGroup) update_moments(i);
            for (size_t i = 0; updates && i < kBlock; i += kGroup) update_weights(i);
            for (size_t i = 0; old_moment.waiting && i < kBlock; i += kGroup) old_moment.encode(encoder_m, i);
            for (size_t i = 0; old_root.waiting && i < kBlock; i += kGroup) old_root.encode(encoder_v, i);
        }
        if (old_moment.waiting) old_moment.settle(encoder_m, map_m);
        if (old_root.waiting) old_root.settle(encoder_v, map_v);
        old_moment.waiting = old_root.waiting = false;
        if (!updates) break;

        uint32_t largest_m = peak_m.all(), largest_v = peak_v.all();
        // m is nan only where the old largest, or g, and then the root, is not finite.
        if (largest_v >= 0x7F800000u || (bits_of(run.absmax_m[block]) & 0x7FFFFFFFu) >= 0x7F800000u) {
            largest_m = moment.exact_peak(), largest_v = root.exact_peak();
        }
        moment.close(map_m, largest_m, now.codes_m, run.absmax_m + block);
        root.close(map_v, largest_v, now.codes_v, run.absmax_v + block);
        run.absmax_v[block] *= run.unit;
        if (!kDirect) {
            uint16_t *to = now.weights.half();
            for (size_t i = 0; i < kBlock; ++i) {
                if (kFormat == Format::residual) {
                    split(weights[i], to[i], now.residual[i]);
                    weights[i] = joined(to[i], now.residual[i]);
                } else {
                    to[i] = rounded_to_nearest(now.master[i]);
                }
            }
        }
        if (run.ema) {
            const uint64_t place = kAverageStream + run.first + block * kBlock;
            const Floats stored = kFormat == Format::residual ? Floats{weights, false}
                                  : kFormat == Format::master ? Floats{now.master, false}
                                                              : now.weights;
            ema(now.ema, stored, run.gain_ema, place, run.stream, 0, kBlock);
        }
    }
    if (tail.codes_m) copy.write_back(tail, length_of(run, last - 1));
}

void adamw8bit(const Run &run, size_t first, size_t last) {
    if (first == last) return;
    if (run.master) {
        steps<Format::master>(run, first, last);
    } else if (run.residual) {
        steps<Format::residual>(run, first, last);
    } else if (run.weights.bf16) {
        steps<Format::stochastic>(run, first, last);
    } else {
        steps<Format::fp32>(run, first, last);
    }
}

}  // namespace leapalign::LEAPALIGN_ISA
