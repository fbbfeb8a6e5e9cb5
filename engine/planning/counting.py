"""Counts what a GPU would hold and compute: live device bytes and FLOPs, by phase, with `meta` playing the GPU.

Nothing is allocated and nothing computed on meta tensors, yet every operator is dispatched. The planner counts a block
at a time (engine/planning/costs.py); bench/memory/simulate.py runs whole steps.

Not counted, because no operator shows it, and so to be added on a real card: the CUDA context, workspaces inside cuBLAS
and flash attention, partial sums inside the fused kernels (at most 10 MiB in FLUX.1), fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ALLOCATION = 512  # the CUDA caching allocator rounds every block up to a multiple of this many bytes
_NUMBERS = frozenset({bool, int, float})
_PLAIN = frozenset({type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format})


@dataclass(frozen=True, eq=False)
class Call:
    """An operator, its arguments, and all that its result's shapes can depend on."""

    operator: Any
    args: Any
    kwargs: Any
    key: Any


# Is told of every operator that ran on the GPU: (call, the GPU's tensors among its arguments, its result).
Observer = Callable[[Call, list[Tensor], Any], None]


@dataclass(frozen=True)
class Holding:
    """Storages of one kind that are alive at a peak: the operator that made them, shape and dtype, how many, bytes."""

    operator: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    counted_bytes: int


@dataclass
class Phase:
    """What one phase took: the most bytes alive during it, also those that were there before, and its FLOPs."""

    counted_bytes: int = 0
    flops: int = 0


class DeviceCounter:
    """Observes a simulated GPU: live bytes, their peak, and FLOPs of every operator.

    A storage counts from the operator that first shows it (result or argument) until it is freed, rounded up to 512
    bytes; views count once. FLOPs are those of torch's own registry (matrix products, convolutions, attention;
    elementwise work is not in it).

    Attributes:
        current, peak: bytes alive now, and the most there were at once.
        flops: floating-point operations so far.
        phases: by name, in the order of their first entry.
    """

    def __init__(self) -> None:
        self.current = self.peak = self.flops = 0
        self.phases: dict[str, Phase] = {}
        self._flops: dict[Any, int] = {}  # by call
        self._watermark = 0  # most bytes since the innermost phase began
        self._live: dict[int, tuple[int, Any, torch.Size, torch.dtype]] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._at_peak: list[tuple[int, Any, torch.Size, torch.dtype]] = []
        self._fresh_peak = False  # the peak has not been left yet, nor listed

    def observe(self, call: Call, given: list[Tensor], result: Any) -> None:
        """Count an operator: its FLOPs, and the storages that it shows for the first time."""
        self.hold(given, call.operator)
        self.hold([tensor for tensor in tensors(result) if is_on_gpu(tensor)], call.operator)
        flops = self._flops.get(call.key)
        if flops is None:
            count = flop_registry.get(call.operator.overloadpacket)
            flops = 0 if count is None else count(*call.args, **call.kwargs, out_val=result)
            self._flops[call.key] = flops
        self.flops += flops

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what runs inside; all phases of one name are one entry. An outer phase includes its inner ones."""
        phase = self.phases.setdefault(name, Phase())
        outer, flops = self._watermark, self.flops
        self._watermark = self.current
        try:
            yield
        finally:
            phase.counted_bytes = max(phase.counted_bytes, self._watermark)
            phase.flops += self.flops - flops
            self._watermark = max(outer, self._watermark)

    def hold(self, values: Iterable[Tensor], operator: Any) -> None:
        """Count the storages of tensors on the GPU that are new; `operator` is said to have made them."""
        for tensor in values:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self._live[key] = (size, operator, tensor.shape, tensor.dtype)
            self._references[key] = weakref.ref(storage, partial(self._free, key))
            self._grow(size)

    def holdings(self) -> list[Holding]:
        """What was alive at the peak, largest first."""
        if self._fresh_peak:
            self._list_holdings()
        kinds = Counter(self._at_peak)
        rows = [
            Holding(str(operator), tuple(shape), str(dtype).removeprefix("torch."), count, count * size)
            for (size, operator, shape, dtype), count in kinds.items()
        ]
        return sorted(rows, key=lambda row: -row.counted_bytes)

    def _grow(self, size: int) -> None:
        self.current += size
        self._watermark = max(self._watermark, self.current)
        if self.current > self.peak:
            self.peak, self._fresh_peak = self.current, True

    def _free(self, key: int, _: Any) -> None:
        if self._fresh_peak and self.current == self.peak:  # just before the peak is left: once a local maximum
            self._list_holdings()
        self.current -= self._live.pop(key)[0]
        del self._references[key]

    def _list_holdings(self) -> None:
        self._at_peak, self._fresh_peak = list(self._live.values()), False


class Counting(TorchDispatchMode):
    """While active, the counter sees every operator on the GPU's tensors. All tensors are on `meta`."""

    def __init__(self, counter: DeviceCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim":
            given: list[Tensor] = []
            key = (func, key_of(args, given), key_of(kwargs, given) if kwargs else None)
            self._counter.observe(Call(func, args, kwargs, key), [each for each in given if is_on_gpu(each)], result)
        return result


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether it is a tensor of the simulated GPU. A fake tensor is the host's, and slow to ask for its device."""
    return type(tensor) is not FakeTensor and tensor.is_meta


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    key_of(values, found)
    return found


def key_of(value: Any, found: list[Tensor]) -> Any:
    """What stands for an argument in the key of a call; its tensors are appended to `found`.

    Shape, stride and dtype for a tensor; a number with its type, as 1 == 1.0 == True.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return tuple([key_of(each, found) for each in value])
    if isinstance(value, Tensor):
        found.append(value)
        return value.shape, value.stride(), value.dtype
    if kind is dict:
        return tuple([(name, key_of(each, found)) for name, each in value.items()])
    return (kind, value) if kind in _NUMBERS else value


@contextmanager
def gpu_operators() -> Iterator[None]:
    """Attention and RMSNorm as a GPU runs them: flash attention (no S x S matrix) and the fused norm.

    On `meta` torch would decompose both. Attention without a mask is sent to
    `aten._scaled_dot_product_flash_attention`.
    """
    functional: Any = torch.nn.functional
    before = functional.scaled_dot_product_attention, functional.rms_norm

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None or dropout_p != 0.0 or enable_gqa:
            return before[0](query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        result: Tensor = out[0]
        return result

    def rms_norm(
        input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if weight is None or len(normalized_shape) != 1:
            return before[1](input, normalized_shape, weight, eps)
        result: Tensor = _FusedRMSNorm.apply(input, weight)
        return result

    functional.scaled_dot_product_attention, functional.rms_norm = attention, rms_norm
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = before


class _FusedRMSNorm(torch.autograd.Function):
    """Shapes and lifetimes of `aten._fused_rms_norm` on CUDA: it saves its input, its weight and one float32 a row.

    The operator itself is no help here: without a kernel for `meta` torch decomposes it above autograd, and every
    float32 intermediate is saved.
    """

    @staticmethod
    def forward(context: Any, input: Tensor, weight: Tensor) -> Tensor:
        rstd = input.new_empty((*input.shape[:-1], 1), dtype=torch.promote_types(input.dtype, torch.float32))
        context.save_for_backward(input, weight, rstd)
        return torch.empty_like(input)

    @staticmethod
    def backward(context: Any, *cotangents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight, _ = context.saved_tensors
        wanted = context.needs_input_grad
        return (
            torch.empty_like(input) if wanted[0] else None,
            torch.empty_like(weight) if wanted[1] else None,
        )
