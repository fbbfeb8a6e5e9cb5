"""The modulation kernels under Triton's interpreter against float64; `test_modulate.py` runs this file in a process.

Bounds follow the longest path to an output, to first order in u = 2^-24 and 1% more. A sum over a row of D has
K = 16 + log2(its block) additions on its path: 16 in a thread, then a tree, or numpy's eight accumulators of 16 and
then a tree. Per row, with a the mean of |·| over the row and hats for what is computed:

    |μ̂ - μ| <= (K + 1) u a(x) =: δ                                     the sum and the division
    ρ = |r̂/r - 1| <= (K + 6) u / 2 + δ² r² / 2 + 2 u                   x - μ twice, square, sum, division, + eps; √, 1/
    |n̂ - n| <= r (δ + u |x - μ|) + |n| (ρ + u) =: ν
    |ŷ - y| <= ν |1 + s| + 3 u |n (1 + s)| + u |y|                     1 + s, the product twice over, the sum

and for the gradients, where A = mean(dn), C = mean(dn n):

    |Ĉ - C| <= a(|dn| ν) + (K + 4) u a(dn n),     |Â - A| <= (K + 3) u a(dn),
    |dx̂ - dx| <= |dx| (ρ + u) + r (2 u |dn| + |Â - A| + |n| |Ĉ - C| + ν |C| + u (2 |dn| + 2 |A| + 3 |n C|)).

A sum over tokens has L = rows of a group + tiles of groups + 64 (numpy adds a tile's rows in order; on a GPU 6)
additions on its path and adds L u times the sum of magnitudes to the errors of its terms. Outputs in bf16 are off by
2^-7 more, relative: the interpreter cuts a float32 off where the hardware rounds it, to half of that.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leapalign.kernels.blocks import rows
from leapalign.kernels.blocks.gated import gated_residual
from leapalign.kernels.blocks.gated_modulate import gated_residual_modulate
from leapalign.kernels.blocks.modulate import layer_norm_modulate

U = 2.0**-24
TINY = 2.0**-126
EPS = 1e-6
OUTPUT = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}
# Tails of the block (48 of 64, 200 of 256, 7 of 8), of the rows of a program and of a group (4), of the second stage's
# tile of columns (32); one element.
SHAPES = [(2, 5, 48), (1, 9, 200), (3, 4, 7), (1, 1, 1), (2, 6, 64)]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


def randn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows_and_vectors(shape: tuple[int, int, int], dtype: torch.dtype, rows: int, vectors: int) -> list[Tensor]:
    """(B, T, D) tensors, then (B, D) ones: columns of a wider tensor, as the hoisted modulations are."""
    batch, _, features = shape
    wider = randn(batch, vectors * features, seed=99, dtype=dtype)
    return [*(randn(*shape, seed=seed, dtype=dtype) for seed in range(rows)), *wider.chunk(vectors, dim=1)]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]


def gradients(*tensors: Tensor) -> list[Tensor]:
    """Those of leaves, which all have one."""
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    assert len(found) == len(tensors)
    return found


def bits(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().contiguous().view(torch.uint8) for tensor in tensors]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.equal(*bits(one, other))


def assert_within(computed: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|computed - exact| <= bound, 1% more for higher orders, and the rounding of the output."""
    assert computed.shape == exact.shape
    allowed = 1.01 * (bound + OUTPUT[computed.dtype] * (exact.abs() + bound)) + TINY
    excess = (computed.double() - exact).abs() / allowed
    assert excess.isfinite().all() and excess.max() <= 1, f"off by {excess.max():.3f} of what is allowed"


def plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


class Row:
    """Errors of the statistics of rows x (B, T, D), and of what follows them, in float64."""

    def __init__(self, x: Tensor, scale: Tensor, eps: float) -> None:
        x, self.factor = x.detach().double(), 1 + scale.detach().double()[:, None]
        self.depth = 16 + math.log2(rows.block_of(x.shape[-1])["BLOCK"])
        centred = x - x.mean(-1, keepdim=True)
        self.r = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        self.n = centred * self.r
        shift = (self.depth + 1) * U * x.abs().mean(-1, keepdim=True)
        self.rho = (self.depth + 6) * U / 2 + (shift * self.r).square() / 2 + 2 * U
        self.nu = self.r * (shift + U * centred.abs()) + self.n.abs() * (self.rho + U)

    def output(self, y: Tensor) -> Tensor:
        return self.nu * self.factor.abs() + 3 * U * (self.n * self.factor).abs() + U * y.abs()

    def gradient(self, g: Tensor, dx: Tensor) -> Tensor:
        dn = g.double() * self.factor
        a, c = dn.mean(-1, keepdim=True).abs(), (dn * self.n).mean(-1, keepdim=True).abs()
        error_a = (self.depth + 3) * U * dn.abs().mean(-1, keepdim=True)
        error_c = (dn.abs() * self.nu + (self.depth + 4) * U * (dn * self.n).abs()).mean(-1, keepdim=True)
        inner = 2 * U * dn.abs() + error_a + self.n.abs() * error_c + self.nu * c
        inner = inner + U * (2 * dn.abs() + 2 * a + 3 * self.n.abs() * c)
        return dx.abs() * (self.rho + U) + self.r * inner


def summed(terms: Tensor, errors: Tensor | float = 0.0) -> Tensor:
    """Bound of a sum over the tokens of terms (B, T, D) that are off by so much, and by a rounding of their own."""
    tokens = terms.shape[1]
    group = rows.rows_of_group(tokens)
    depth = group + math.ceil(tokens / group / rows.SUM_GROUPS) + rows.SUM_GROUPS
    return ((depth + 1) * U * terms.double().abs() + errors).sum(1)


def check_modulate(x: Tensor, shift: Tensor, scale: Tensor, g: Tensor, eps: float = EPS) -> None:
    """Output and gradients of `layer_norm_modulate` against float64 autograd."""
    x, shift, scale = leaves(x, shift, scale)
    y = layer_norm_modulate(x, shift, scale, eps)
    y.backward(g)
    exact = leaves(x.double(), shift.double(), scale.double())
    expected = plain(exact[0], exact[1], exact[2], eps)
    expected.backward(g.double())
    row = Row(x, scale, eps)
    assert_within(y.detach(), expected.detach(), row.output(expected.detach()))
    (dx, dshift, dscale), (dx_, dshift_, dscale_) = gradients(x, shift, scale), gradients(*exact)
    assert_within(dx, dx_, row.gradient(g, dx_))
    assert_within(dshift, dshift_, summed(g))
    assert_within(dscale, dscale_, summed(g.double() * row.n, g.double().abs() * row.nu))


def check_residual(x: Tensor, y: Tensor, g: Tensor, gate: Tensor) -> None:
    inputs = leaves(x, gate, y)
    h = gated_residual(inputs[0], inputs[1], inputs[2])
    h.backward(g)
    x, gate, y, g = (tensor.double() for tensor in (x, gate, y, g))
    product = gate[:, None] * y
    assert_within(h.detach(), x + product, U * (product.abs() + (x + product).abs()))
    dx, dgate, dy = gradients(*inputs)
    assert torch.equal(dx.double(), g)
    assert_within(dy, gate[:, None] * g, U * (gate[:, None] * g).abs())
    assert_within(dgate, (g * y).sum(1), summed(g * y))


def all_gradients(
    x: Tensor, y: Tensor, g: Tensor, q: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> list[Tensor]:
    """Outputs of the fused operator and gradients, in the order of its arguments."""
    x, gate, y, shift, scale = leaves(x, gate, y, shift, scale)
    h, m = gated_residual_modulate(x, gate, y, shift, scale, EPS)
    torch.autograd.backward((h, m), (g, q))
    return [h.detach(), m.detach(), *gradients(x, gate, y, shift, scale)]


def check_fused(x: Tensor, y: Tensor, g: Tensor, q: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> None:
    """The two-kernel composition's bits forward; gradients against float64 autograd from the stored h on."""
    h, m, dx, dgate, dy, dshift, dscale = all_gradients(x, y, g, q, gate, shift, scale)
    apart = gated_residual(x, gate, y)
    assert_same_bits([h, m], [apart, layer_norm_modulate(apart, shift, scale, EPS)])

    stored, shift_, scale_ = leaves(h.double(), shift.double(), scale.double())
    plain(stored, shift_, scale_, EPS).backward(q.double())
    row = Row(h, scale, EPS)
    through, dshift_, dscale_ = gradients(stored, shift_, scale_)
    dx_ = g.double() + through
    error = row.gradient(q, through) + U * dx_.abs()
    assert_within(dx, dx_, error)
    factor = gate.double()[:, None]
    assert_within(dy, factor * dx_, factor.abs() * error + U * (factor * dx_).abs())
    assert_within(dgate, (dx_ * y.double()).sum(1), summed(dx_ * y.double(), y.double().abs() * error))
    assert_within(dshift, dshift_, summed(q))
    assert_within(dscale, dscale_, summed(q.double() * row.n, q.double().abs() * row.nu))


@BOTH
@SHAPED
def test_modulate_and_its_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, g, shift, scale = rows_and_vectors(shape, dtype, 2, 2)
    check_modulate(x, shift, scale, g)


@BOTH
@SHAPED
def test_residual_and_its_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_residual(*rows_and_vectors(shape, dtype, 3, 1))


@BOTH
@SHAPED
def test_fused_and_its_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_fused(*rows_and_vectors(shape, dtype, 4, 3))


@pytest.mark.parametrize(("tokens", "most", "group"), [(277, 256, 4), (45, 8, 6)], ids=["70 groups", "longer groups"])
def test_sums_over_many_groups(tokens: int, most: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups in two tiles of the second stage, and groups of more than four rows; the last of each has a tail."""
    monkeypatch.setattr(rows, "GROUPS", most)
    x, g, shift, scale = rows_and_vectors((1, tokens, 5), torch.float32, 2, 2)
    assert rows.rows_of_group(tokens) == group
    check_modulate(x, shift, scale, g)


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("large mean", 1.0, 1e3),
        ("large", 1e15, 0.0),
        ("below eps", 1e-8, 0.0),
        ("no variance", 0.0, 0.1),
        ("zero", 0.0, 0.0),
    ],
)
def test_modulate_of_extreme_rows(name: str, size: float, mean: float) -> None:
    x, g, shift, scale = rows_and_vectors((1, 5, 100), torch.float32, 2, 2)
    check_modulate(x * size + mean, shift, scale, g)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, g: Tensor) -> list[Tensor]:
    """Output of `layer_norm_modulate` and gradients, in the order of its arguments."""
    x, shift, scale = leaves(x, shift, scale)
    y = layer_norm_modulate(x, shift, scale, EPS)
    y.backward(g)
    return [y.detach(), *gradients(x, shift, scale)]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_spoils_what_is_documented_and_nothing_else(value: float) -> None:
    x, g, shift, scale = rows_and_vectors((2, 6, 20), torch.float32, 2, 2)
    y, *clean = modulated(x, shift, scale, g)
    row, column = torch.ones(2, 6, dtype=torch.bool), torch.ones(2, 20, dtype=torch.bool)
    row[0, 2], column[0, 3] = False, False

    broken = x.clone()
    broken[0, 2, 3] = value
    y_, dx, dshift, dscale = modulated(broken, shift, scale, g)
    assert y_[0, 2].isnan().all() and dx[0, 2].isnan().all() and dscale[0].isnan().all()
    assert_same_bits([y_[row], dx[row], dshift, dscale[1]], [y[row], clean[0][row], clean[1], clean[2][1]])

    broken = g.clone()
    broken[0, 2, 3] = value
    y_, dx, dshift, dscale = modulated(x, shift, scale, broken)
    assert not (dx[0, 2].isfinite().any() or dshift[0, 3].isfinite() or dscale[0, 3].isfinite())
    assert_same_bits(
        [y_, dx[row], dshift[column], dscale[column]], [y, clean[0][row], clean[1][column], clean[2][column]]
    )


def test_a_samples_bits_depend_on_no_run_no_batch_and_no_layout() -> None:
    x, y, g, q, *vectors = rows_and_vectors((3, 10, 24), torch.float32, 4, 3)
    first = all_gradients(x, y, g, q, *vectors)
    assert_same_bits(first, all_gradients(x, y, g, q, *vectors))
    alone = all_gradients(*(tensor[1:2] for tensor in (x, y, g, q, *vectors)))
    assert_same_bits([tensor[1:2] for tensor in first], alone)

    joint = [torch.cat([torch.ones(3, 4, 24), tensor], dim=1)[:, 4:] for tensor in (x, y, g, q)]
    assert_same_bits(first, all_gradients(*joint, *vectors))
    turned = [tensor.mT.contiguous().mT for tensor in (x, y, g, q)]
    assert_same_bits(first, all_gradients(*turned, *(vector.contiguous() for vector in vectors)))


def test_gradients_that_are_expanded() -> None:
    """.sum().backward() passes a gradient whose strides are zero."""
    x, y, *vectors = rows_and_vectors((2, 5, 12), torch.float32, 2, 3)
    ones, expanded = torch.ones(2, 5, 12), torch.ones(()).expand(2, 5, 12)
    assert_same_bits(all_gradients(x, y, ones, ones, *vectors), all_gradients(x, y, expanded, expanded, *vectors))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    x, y, g, q, *vectors = rows_and_vectors(shape, torch.float32, 4, 3)
    h, m, dx, dgate, dy, dshift, dscale = all_gradients(x, y, g, q, *vectors)
    assert h.shape == m.shape == dx.shape == dy.shape == shape
    for gradient in (dgate, dshift, dscale):
        assert torch.equal(gradient, torch.zeros(shape[0], shape[2]))
    assert gated_residual(x, vectors[0], y).shape == shape
