"""What `python -m bench kernels` measures: every operation with the bytes that it has to move, beside other ways to it.

Bytes are those of the large tensors, each read or written once, whoever does it; vectors of a sample, statistics and
partial sums are left out, so that no implementation is credited with its own overhead. FLUX.1-dev: 24 heads of 128,
512 text tokens and a token for 16 x 16 pixels, as one sequence; latents of 64 channels.

    torch eager     the arithmetic as diffusers and the paper write it
    torch.compile   the same, compiled for these shapes
    Liger           its LayerNorm with 1 + scale and shift as weight and bias (the same for one sample); its RMSNorm
                    before diffusers' rotation (its own turns halves, not neighbours)

Errors are relative to the largest magnitude of the same operation in float64, over all outputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional

from bench.kernels.timing import Call
from leapalign.kernels.blocks.gated import gated_residual
from leapalign.kernels.blocks.gated_modulate import gated_residual_modulate
from leapalign.kernels.blocks.modulate import layer_norm_modulate
from leapalign.kernels.blocks.qk_norm_rope import forward_reference, qk_norm_rope
from leapalign.kernels.leap.cotangents import cotangents, cotangents_reference
from leapalign.kernels.leap.prediction import leap, leap_distances, leap_reference

Tensors = tuple[Tensor, ...]
Function = Callable[..., Any]  # of the inputs, to a tensor or a tuple of tensors
Prepare = Callable[[Tensors], Call]
EPS = 1e-6
TAU, ALPHA = 0.1, 0.5


@dataclass(frozen=True)
class Shapes:
    """What sizes follow from. A block has `batch` images at once, the leap all `samples` of a step."""

    resolution: int
    batch: int = 1
    heads: int = 24
    head_dim: int = 128
    text: int = 512
    channels: int = 64
    samples: int = 8
    parameters: int = 226_548_224  # of a double block without modulation, whose gradient is outer products

    @property
    def image(self) -> int:
        """Image tokens."""
        return (self.resolution // 16) ** 2

    @property
    def tokens(self) -> int:
        """Of the joint sequence."""
        return self.text + self.image

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        name: of the operation.
        dtype: of the large tensors, in words.
        moved: bytes that it reads and writes at least.
        inputs: draws them; called once for each set, whose tensors are on the generator's device.
        exact: its results in float64, of the inputs.
        ways: {implementation: how to make a call of it on some inputs, or why it is not there}.
    """

    name: str
    dtype: str
    moved: int
    inputs: Callable[[torch.Generator], Tensors]
    exact: Callable[[Tensors], Tensors]
    ways: Mapping[str, Prepare | str]


def cases(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    """The operations of a block and of the leap, at one resolution."""
    yield from _rows(shapes, device)
    yield from _heads(shapes, device)
    for dtype in (torch.float32, torch.bfloat16):
        yield from _latents(shapes, device, dtype)


def optional(module: str) -> Any:
    """An installed module, or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def compiled(function: Function, device: torch.device) -> Function:
    """`function` by torch.compile; on a CPU without generating code, which would take longer than all else."""
    found: Function = torch.compile(
        function, dynamic=False, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    return found


# ---- from functions to cases ---------------------------------------------------------------------------------------


def _both_ways(
    name: str,
    inputs: Callable[[torch.Generator], Tensors],
    leaves: int,
    functions: Mapping[str, Function | str],
    exact: Function,
    forward: int,
    backward: int,
) -> Iterator[Case]:
    """A forward and a backward case; the first `leaves` of the inputs have gradients."""
    kinds = {"forward": (forward, _forward), "backward": (backward, _backward)}
    for kind, (moved, call_of) in kinds.items():

        def prepare(function: Function, call_of: Function = call_of) -> Prepare:
            return lambda tensors: call_of(function, tensors, leaves)

        def in_float64(tensors: Tensors, call_of: Function = call_of) -> Tensors:
            found: Tensors = call_of(exact, tuple(tensor.double() for tensor in tensors), leaves)()
            return found

        ways = {way: f if isinstance(f, str) else prepare(f) for way, f in functions.items()}
        yield Case(f"{name} {kind}", "bf16", moved, inputs, in_float64, ways)


def _forward(function: Function, tensors: Tensors, leaves: int) -> Call:
    given = _with_gradients(tensors, leaves)
    return lambda: _tuple(function(*given))


def _backward(function: Function, tensors: Tensors, leaves: int) -> Call:
    given = _with_gradients(tensors, leaves)
    outputs = _tuple(function(*given))
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    drawn = [torch.randn(y.shape, generator=generator, device=y.device) for y in outputs]
    arriving = [g.bfloat16().to(y.dtype) for g, y in zip(drawn, outputs, strict=True)]  # the same for float64
    return lambda: torch.autograd.grad(outputs, given[:leaves], arriving, retain_graph=True)


def _with_gradients(tensors: Tensors, leaves: int) -> Tensors:
    return tuple(tensor.detach().requires_grad_(index < leaves) for index, tensor in enumerate(tensors))


def _tuple(found: Any) -> Tensors:
    return tuple(found) if isinstance(found, tuple) else (found,)


def _drawn(generator: torch.Generator, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensors:
    return tuple(torch.randn(shape, generator=generator, device=generator.device).to(dtype) for shape in shapes)


# ---- rows of tokens ------------------------------------------------------------------------------------------------


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _gated_modulated(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensors:
    h = _gated(x, gate, y)
    return h, _modulated(h, shift, scale)


def _liger_modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    found: Tensor = optional("liger_kernel.transformers.functional").liger_layer_norm(x, 1 + scale[0], shift[0], EPS)
    return found


def _rows(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    x, vector = (shapes.batch, shapes.tokens, shapes.width), (shapes.batch, shapes.width)
    array = 2 * shapes.batch * shapes.tokens * shapes.width  # bytes
    liger: Function | str = _liger_modulated
    if optional("liger_kernel") is None:
        liger = "not installed"
    elif shapes.batch > 1:
        liger = "one weight for all samples"
    for name, ours, plain, given, forward, backward in (
        ("modulate", layer_norm_modulate, _modulated, (x, vector, vector), 2, 3),  # x, y; g, x, dx
        ("gated", gated_residual, _gated, (x, vector, x), 3, 3),  # x, y, h; g, y, dy
        # x, y, h, m; their gradients, h and y
        ("gated_modulate", gated_residual_modulate, _gated_modulated, (x, vector, x, vector, vector), 4, 6),
    ):
        functions: dict[str, Function | str] = {"leapalign": ours, "torch eager": plain}
        functions["torch.compile"] = compiled(plain, device)
        if name == "modulate":
            functions["Liger"] = liger

        def inputs(generator: torch.Generator, given: tuple[tuple[int, ...], ...] = given) -> Tensors:
            return _drawn(generator, torch.bfloat16, *given)

        yield from _both_ways(name, inputs, len(given), functions, plain, forward * array, backward * array)


# ---- heads of q and k ----------------------------------------------------------------------------------------------


def _turned(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    normed = (functional.rms_norm(x, x.shape[-1:], w, EPS) for x, w in ((q, weight_q), (k, weight_k)))
    return tuple(apply_rotary_emb(x, (cos, sin), sequence_dim=1) for x in normed)


def _turned_exactly(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    return tuple(forward_reference(x, w, cos, sin, EPS, 0) for x, w in ((q, weight_q), (k, weight_k)))


def _liger_turned(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> Tensors:
    rms_norm = optional("liger_kernel.transformers.functional").liger_rms_norm
    # in_place=False: else its backward overwrites the gradient that arrives
    normed = (rms_norm(x, w, EPS, 0.0, "llama", False) for x, w in ((q, weight_q), (k, weight_k)))
    return tuple(apply_rotary_emb(x, (cos, sin), sequence_dim=1) for x in normed)


def _heads(shapes: Shapes, device: torch.device) -> Iterator[Case]:
    x = (shapes.batch, shapes.tokens, shapes.heads, shapes.head_dim)
    array = 2 * shapes.batch * shapes.tokens * shapes.width
    tables = 8 * shapes.tokens * shapes.head_dim

    def inputs(generator: torch.Generator) -> Tensors:
        (angles,) = _drawn(generator, torch.float32, (shapes.tokens, shapes.head_dim // 2))
        angles = angles.repeat_interleave(2, 1)
        weights = (1 + 0.1 * weight for weight in _drawn(generator, torch.bfloat16, x[3:], x[3:]))
        return *_drawn(generator, torch.bfloat16, x, x), *weights, angles.cos(), angles.sin()

    functions: dict[str, Function | str] = {
        "leapalign": partial(qk_norm_rope, eps=EPS),
        "torch eager": _turned,
        "torch.compile": compiled(_turned, device),
        "Liger": "not installed" if optional("liger_kernel") is None else _liger_turned,
    }
    moved = 4 * array + tables, 6 * array + tables  # q, k, q', k'; their gradients, q and k
    yield from _both_ways("qk_norm_rope", inputs, 4, functions, _turned_exactly, *moved)


# ---- latents -------------------------------------------------------------------------------------------------------


def _latents(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    x, level = (shapes.samples, shapes.image, shapes.channels), (shapes.samples,)
    array = dtype.itemsize * shapes.samples * shapes.image * shapes.channels

    def of_leap(function: Function) -> Function:
        return lambda *tensors: function(*tensors, TAU)

    def distances(*tensors: Any) -> Tensors:
        return tuple(leap_reference(*tensors)[2:])

    def both_cotangents(function: Function) -> Function:
        return lambda g, u, k, j: function(g, u, ALPHA, k, j)

    def plainly(g: Tensor, u: Tensor, k: Tensor, j: Tensor) -> Tensors:
        return cotangents_reference(g, u, ALPHA, k, j, g.dtype)[:2]

    for name, ours, plain, count, arrays in (
        ("leap", of_leap(leap), of_leap(leap_reference), 5, 7),
        ("leap, distances only", of_leap(leap_distances), of_leap(distances), 5, 5),
        ("cotangents", both_cotangents(cotangents), plainly, 2, 4),
    ):

        def inputs(generator: torch.Generator, count: int = count) -> Tensors:
            j = torch.rand(level, generator=generator, device=device) / 2
            return *_drawn(generator, dtype, *[x] * count), j + 0.25, j

        def prepare(function: Function) -> Prepare:
            return lambda tensors: lambda: _tuple(function(*tensors))

        def exact(tensors: Tensors, plain: Function = plain) -> Tensors:
            return _tuple(plain(*(tensor.double() for tensor in tensors)))

        ways = {"leapalign": ours, "torch eager": plain, "torch.compile": compiled(plain, device)}
        prepared: dict[str, Prepare | str] = {way: prepare(function) for way, function in ways.items()}
        yield Case(name, {4: "fp32", 2: "bf16"}[dtype.itemsize], arrays * array, inputs, exact, prepared)
