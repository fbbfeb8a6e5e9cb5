// Python bindings of the host kernels. Arrays cross by DLPack, bf16 included, so that no torch is linked. kernels/host/native.py
// checks arguments and keeps tensors alive until their job is done; here only what would be unsafe is refused.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "pool.h"

namespace nb = nanobind;

namespace leapalign {
namespace {

using Array = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Optional = std::optional<Array>;
using Handle = std::shared_ptr<Job>;

struct NotFinite : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ---- instruction sets ----

std::vector<const Kernels *> available() {
    std::vector<const Kernels *> found{&scalar::kernels};
#if defined(LEAPALIGN_X86)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        found.push_back(&avx2::kernels);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl")) {
            found.push_back(&avx512bw::kernels);
            if (__builtin_cpu_supports("avx512vbmi")) found.push_back(&avx512::kernels);
        }
    }
#endif
    return found;
}

std::atomic<const Kernels *> chosen{available().back()};

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels *kernels : available()) names.emplace_back(kernels->name);
    return names;
}

void use_isa(const std::string &name) {
    for (const Kernels *kernels : available()) {
        if (name == kernels->name) {
            chosen = kernels;
            return;
        }
    }
    throw std::invalid_argument("this processor or build has no " + name + " kernels");
}

// ---- arrays ----

// A fake tensor has a size and no memory.
void *memory_of(const Array &array, const char *name) {
    if (array.size() && !array.data()) throw std::invalid_argument(std::string(name) + " is a fake tensor, without memory");
    return array.data();
}

size_t require(const Array &array, size_t count, uint8_t code, uint8_t bits, const char *name) {
    if (array.size() != count || array.dtype().code != code || array.dtype().bits != bits) {
        throw std::invalid_argument(std::string(name) + " has another length or dtype");
    }
    return count;
}

Floats floats(const Array &array, size_t count, const char *name) {
    const bool bf16 = array.dtype() == nb::dlpack::dtype{4, 16, 1};  // kDLBfloat
    require(array, count, bf16 ? 4 : 2, bf16 ? 16 : 32, name);
    return {memory_of(array, name), bf16};
}

template <typename Scalar>
Scalar *scalars(const Array &array, size_t count, const char *name) {
    require(array, count, static_cast<uint8_t>(nb::dtype<Scalar>().code), 8 * sizeof(Scalar), name);
    return static_cast<Scalar *>(memory_of(array, name));
}

size_t ceil_div(size_t count, size_t by) { return (count + by - 1) / by; }

Handle submitted(const Handle &job) {
    Pool::instance().submit(job);
    return job;
}

Handle new_job(size_t threads) { return std::make_shared<Job>(threads ? threads : 1); }

// ---- kernels ----

constexpr size_t kGrain = 1 << 16;  // elements that a thread takes at a time: some 50 us
constexpr const char *kNotFinite = "the gradient is not finite: weights and states are as they were";

double largest_of(const Floats &x, size_t begin, size_t count) {
    float largest = 0;
    for (size_t i = begin; i < begin + count; ++i) {
        const float value = std::fabs(x.bf16 ? float_of(uint32_t{x.half()[i]} << 16) : x.fp32()[i]);
        if (std::isnan(value)) return value;
        if (value > largest) largest = value;
    }
    return largest;
}

// Whether no product of the factors and no sum can overflow: then the gradient need not be expanded to be checked.
bool stays_finite(const Factors &factors) {
    double bound = 0;
    for (size_t term = 0; term < factors.terms; ++term) {
        bound += largest_of(factors.left, term * factors.rows, factors.rows) *
                 largest_of(factors.right, term * factors.cols, factors.cols);
    }
    return bound < std::numeric_limits<float>::max() / 2;  // false for nan
}

Handle adamw8bit(Array weights, Optional gradient, Optional left, Optional right, Array codes_m, Array absmax_m,
                 Array codes_v, Array absmax_v, Optional residual, Optional master, Optional ema, uint64_t seed,
                 uint32_t step, uint32_t parameter, uint64_t first, double gain, double decay_m, double decay_root,
                 double unit, double root_gain, double eps, double decay_w, double gain_ema, bool guarded,
                 size_t threads) {
    const size_t count = weights.size(), blocks = ceil_div(count, kBlock);
    Run run{};
    run.count = count, run.first = first, run.stream = {seed, step, parameter};
    run.weights = floats(weights, count, "weights");
    run.codes_m = scalars<uint8_t>(codes_m, count, "codes_m");
    run.codes_v = scalars<uint8_t>(codes_v, count, "codes_v");
    run.absmax_m = scalars<float>(absmax_m, blocks, "absmax_m");
    run.absmax_v = scalars<float>(absmax_v, blocks, "absmax_v");
    if (residual) run.residual = scalars<int8_t>(*residual, count, "residual");
    if (master) run.master = scalars<float>(*master, count, "master");
    if (ema) run.ema = floats(*ema, count, "ema");
    if (gradient) {
        run.gradient = floats(*gradient, count, "gradient");
    } else {
        if (!left || !right || left->ndim() != 2 || right->ndim() != 2 || left->shape(0) != right->shape(0) ||
            left->shape(1) * right->shape(1) != count) {
            throw std::invalid_argument("left and right are not the factors of a gradient");
        }
        Factors &factors = run.factors;
        factors.terms = left->shape(0), factors.rows = left->shape(1), factors.cols = right->shape(1);
        factors.left = floats(*left, left->size(), "left"), factors.right = floats(*right, right->size(), "right");
    }
    if ((run.residual || run.master) && !run.weights.bf16) throw std::invalid_argument("weights are not bfloat16");
    if (first % kBlock) throw std::invalid_argument("first is not the beginning of a block");
    const ExactFloats exact;  // where a scalar is subnormal, too
    const auto once = [](double value) { return static_cast<float>(value); };
    run.gain = once(gain), run.decay_m = once(decay_m), run.decay_root = once(decay_root), run.unit = once(unit);
    run.root_gain = once(root_gain), run.eps = once(eps), run.decay_w = once(decay_w), run.gain_ema = once(gain_ema);

    const Kernels *kernels = chosen;
    const Handle job = new_job(threads);
    if (!guarded) {
        const auto bad = std::make_shared<std::atomic<bool>>(false), safe = std::make_shared<std::atomic<bool>>(false);
        if (!run.gradient) {
            job->phases.push_back({1, 1, [=](size_t, size_t) { *safe = stays_finite(run.factors); }});
        }
        const auto check = [=](size_t begin, size_t end) {
            if (*bad || *safe) return;
            const bool finite = run.gradient ? kernels->finite(run.gradient, begin * kBlock, std::min(end * kBlock, count))
                                             : kernels->finite_factors(run, begin, end);
            if (!finite) *bad = true;
        };
        job->phases.push_back({blocks, kGrain / kBlock, check, [=] {
                                   if (*bad) throw NotFinite(kNotFinite);
                               }});
    }
    const auto update = [=](size_t begin, size_t end) { kernels->adamw8bit(run, begin, end); };
    job->phases.push_back({blocks, kGrain / kBlock, update});
    return submitted(job);
}

Handle round_stochastic(Array x, Array out, uint64_t seed, uint32_t step, uint32_t parameter, uint64_t offset,
                        size_t threads) {
    const float *source = scalars<float>(x, x.size(), "x");
    const Floats target = floats(out, x.size(), "out");
    if (!target.bf16) throw std::invalid_argument("out is not bfloat16");
    const Stream stream{seed, step, parameter};
    const Kernels *kernels = chosen;
    const Handle job = new_job(threads);
    job->phases.push_back({x.size(), kGrain, [=](size_t begin, size_t end) {
                               kernels->round_stochastic(source, target.half(), offset, stream, begin, end);
                           }});
    return submitted(job);
}

Handle sum_of_squares(Array array, size_t threads) {
    const size_t count = array.size(), chunks = ceil_div(count, kChunk);
    const Floats x = floats(array, count, "x");
    const Kernels *kernels = chosen;
    const Handle job = new_job(threads);
    const auto sums = std::make_shared<std::vector<double>>(chunks);
    Job *const self = job.get();  // which owns the functions
    const auto work = [=](size_t begin, size_t end) { kernels->chunk_sums(x, count, sums->data(), begin, end); };
    const auto then = [=] {  // neighbours, then neighbours of the results: the error grows with log2(chunks)
        double *const values = sums->data();
        for (size_t width = chunks; width > 1;) {
            const size_t half = width / 2;
            for (size_t i = 0; i < half; ++i) values[i] = values[2 * i] + values[2 * i + 1];
            if (width % 2) values[half] = values[width - 1];
            width = half + width % 2;
        }
        self->result = chunks ? values[0] : 0.0;
    };
    job->phases.push_back({chunks, kGrain / kChunk, work, then});
    return submitted(job);
}

Handle accumulate(Array sum, Array x, size_t threads) {
    const Floats target = floats(sum, sum.size(), "sum"), source = floats(x, sum.size(), "x");
    const Kernels *kernels = chosen;
    const Handle job = new_job(threads);
    job->phases.push_back({sum.size(), kGrain, [=](size_t begin, size_t end) {
                               kernels->accumulate(target, source, begin, end);
                           }});
    return submitted(job);
}

Handle ema(Array average, Array weights, double gain, uint64_t seed, uint32_t step, uint32_t parameter, uint64_t first,
           size_t threads) {
    const Floats target = floats(average, average.size(), "average"), source = floats(weights, average.size(), "weights");
    const Stream stream{seed, step, parameter};
    const Kernels *kernels = chosen;
    const Handle job = new_job(threads);
    job->phases.push_back({average.size(), kGrain, [=](size_t begin, size_t end) {
                               kernels->ema(target, source, static_cast<float>(gain), kAverageStream + first, stream, begin, end);
                           }});
    return submitted(job);
}

Handle copy(Array to, Array from, size_t threads) {
    if (to.nbytes() != from.nbytes()) throw std::invalid_argument("to and from differ in size");
    uint8_t *target = static_cast<uint8_t *>(memory_of(to, "to"));
    const uint8_t *source = static_cast<const uint8_t *>(memory_of(from, "from"));
    const Handle job = new_job(threads);
    job->phases.push_back({to.nbytes(), 16 * kGrain, [=](size_t begin, size_t end) {
                               std::memcpy(target + begin, source + begin, end - begin);
                           }});
    return submitted(job);
}

// ---- waiting ----

double wait(const Handle &job) {
    for (;;) {
        bool done;
        {
            nb::gil_scoped_release unlocked;
            done = Pool::instance().wait(*job, 0.1);
        }
        if (done) return job->result;
        if (PyErr_CheckSignals()) throw nb::python_error();  // Ctrl-C: the job goes on
    }
}

bool done(const Handle &job) { return job->done(); }

void pin(const std::vector<int> &cores) {
    nb::gil_scoped_release unlocked;
    Pool::instance().pin(cores);
}

void stop() {
    nb::gil_scoped_release unlocked;
    Pool::instance().stop();
}

}  // namespace
}  // namespace leapalign

NB_MODULE(_host, module) {
    using namespace leapalign;
    module.doc() = "Host kernels in C++; call them through leapalign.kernels.host.native.";
    nb::register_exception_translator([](const std::exception_ptr &error, void *) {
        try {
            std::rethrow_exception(error);
        } catch (const NotFinite &exception) {
            PyErr_SetString(PyExc_FloatingPointError, exception.what());
        }
    });
    nb::class_<Job>(module, "Job").def("wait", &wait).def("done", &done);
    module.def("adamw8bit", &adamw8bit, nb::arg("weights"), nb::arg("gradient").none(), nb::arg("left").none(),
               nb::arg("right").none(), nb::arg("codes_m"), nb::arg("absmax_m"), nb::arg("codes_v"), nb::arg("absmax_v"),
               nb::arg("residual").none(), nb::arg("master").none(), nb::arg("ema").none(), nb::arg("seed"),
               nb::arg("step"), nb::arg("parameter"), nb::arg("first"), nb::arg("gain"), nb::arg("decay_m"),
               nb::arg("decay_root"), nb::arg("unit"), nb::arg("root_gain"), nb::arg("eps"), nb::arg("decay_w"),
               nb::arg("gain_ema"), nb::arg("guarded"), nb::arg("threads"));
    module.def("round_stochastic", &round_stochastic, nb::arg("x"), nb::arg("out"), nb::arg("seed"), nb::arg("step"),
               nb::arg("parameter"), nb::arg("offset"), nb::arg("threads"));
    module.def("sum_of_squares", &leapalign::sum_of_squares, nb::arg("x"), nb::arg("threads"));
    module.def("accumulate", &leapalign::accumulate, nb::arg("sum"), nb::arg("x"), nb::arg("threads"));
    module.def("ema", &leapalign::ema, nb::arg("average"), nb::arg("weights"), nb::arg("gain"), nb::arg("seed"),
               nb::arg("step"), nb::arg("parameter"), nb::arg("first"), nb::arg("threads"));
    module.def("copy", &leapalign::copy, nb::arg("to"), nb::arg("source"), nb::arg("threads"));
    module.def("isas", &isas);
    module.def("use_isa", &use_isa, nb::arg("name"));
    module.def("isa", [] { return std::string(chosen.load()->name); });
    module.def("pin", &pin, nb::arg("cores"));
    module.def("stop", &leapalign::stop);
}
