// Python bindings of the host kernels. Arrays cross by DLPack, bf16 included, so that no torch is linked; the interpreter
// lock is released while they run. kernels/host.py checks arguments; here only what would be unsafe is refused.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "reduction.h"
#include "rounding.h"

namespace nb = nanobind;

namespace leapalign {
struct bfloat16 {
    uint16_t bits;
};
}  // namespace leapalign

namespace nanobind::detail {
template <>
struct dtype_traits<leapalign::bfloat16> {
    static constexpr dlpack::dtype value{4, 16, 1};  // kDLBfloat, bits, lanes
    static constexpr auto name = const_name("bfloat16");
};
}  // namespace nanobind::detail

namespace leapalign {
namespace {

template <typename Scalar>
using Flat = nb::ndarray<Scalar, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void round_stochastic_into(Flat<const float> x, Flat<bfloat16> out, uint64_t seed, uint32_t step, uint32_t parameter,
                           uint64_t offset, size_t threads) {
    if (x.shape(0) != out.shape(0)) throw std::invalid_argument("x and out differ in length");
    const float *source = x.data();
    uint16_t *target = reinterpret_cast<uint16_t *>(out.data());
    nb::gil_scoped_release unlocked;
    round_array(source, target, x.shape(0), offset, Stream{seed, step, parameter}, threads);
}

double sum_of_squares_bf16(Flat<const bfloat16> x, size_t threads) {
    const uint16_t *source = reinterpret_cast<const uint16_t *>(x.data());
    nb::gil_scoped_release unlocked;
    return sum_of_squares(source, x.shape(0), threads);
}

}  // namespace
}  // namespace leapalign

NB_MODULE(_host, module) {
    module.doc() = "Host kernels in C++; call them through leapalign.kernels.host.";
    module.def("round_stochastic_into", &leapalign::round_stochastic_into, nb::arg("x").noconvert(),
               nb::arg("out").noconvert(), nb::arg("seed"), nb::arg("step"), nb::arg("parameter"), nb::arg("offset"),
               nb::arg("threads"));
    module.def("sum_of_squares_bf16", &leapalign::sum_of_squares_bf16, nb::arg("x").noconvert(), nb::arg("threads"));
}
