"""A host and a GPU without memory or arithmetic: what runs here only finds out shapes, dtypes and lifetimes.

The host's tensors are fake (`FakeTensorMode`), of any size. The GPU's are plain `meta` tensors: autograd on fake CUDA
tensors aborts the process where torch has no CUDA, and `FakeTensorMode` takes 0.2 ms an operator, ten minutes for one
step of a 12B model. The shapes that an operator returns depend on its arguments alone, so they are remembered.

Two operators would take a path that no GPU takes; `gpu_operators` puts that right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_GPU = torch.device("meta")
_NUMBERS = frozenset({bool, int, float})
_PLAIN = frozenset({type(None), str, torch.dtype, torch.device, torch.layout, torch.memory_format})
_ALIAS = object()  # the result shares memory with an argument: it has to be made by the operator each time


@dataclass(frozen=True, eq=False)
class Call:
    """An operator, its arguments, and all that its result's shapes can depend on."""

    operator: Any
    args: Any
    kwargs: Any
    key: Any


# Is told of every operator that ran on the GPU: (call, the GPU's tensors among its arguments, its result).
Observer = Callable[[Call, list[Tensor], Any], None]


class HostAndDevice(TorchDispatchMode):
    """While active, CPU tensors that are made are fake, and `meta` plays the GPU.

    Copies from one to the other happen in shape only. Any other operator takes tensors of one of them, as on a real
    machine.
    """

    def __init__(self) -> None:
        super().__init__()
        self._host = FakeTensorMode(allow_non_fake_inputs=True)  # literals: the list in x[[0, 2]]
        self._known: dict[Any, Any] = {}  # key of a call -> description of its result
        self._observer: Observer | None = None

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Tell the observer of what runs inside."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor, e.g. prim.device
            return func(*args, **kwargs)
        given: list[Tensor] = []
        key = (func, _key(args, given), _key(kwargs, given) if kwargs else None)
        on_gpu = [tensor for tensor in given if is_on_gpu(tensor)]
        if func is torch.ops.aten.copy_.default:
            self._tell(Call(func, args, kwargs, key), on_gpu, args[0])
            return args[0]
        to = kwargs.get("device")
        to_gpu = bool(on_gpu) if to is None else to.type == "meta"
        if not given or len(on_gpu) == (len(given) if to_gpu else 0):  # all tensors are where the result will be
            if not to_gpu:
                with self._host:
                    return func(*args, **kwargs)
            result = self._on_device(func, args, kwargs, given, key)
        else:
            assert len(on_gpu) in (0, len(given)) and to is not None, f"{func} takes tensors of host and device"
            result = self._moved(func, args, kwargs, to_gpu)
        self._tell(Call(func, args, kwargs, key), on_gpu, result)
        return result

    def _tell(self, call: Call, given: list[Tensor], result: Any) -> None:
        if self._observer is not None:
            self._observer(call, given, result)

    def _on_device(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], key: Any) -> Any:
        known = self._known.get(key)
        if known is None:
            result = func(*args, **kwargs)
            self._known[key] = _description(result, {tensor.untyped_storage()._cdata for tensor in given})
            return result
        if known is _ALIAS:
            return func(*args, **kwargs)
        return _made(known)

    def _moved(self, func: Any, args: Any, kwargs: Any, to_gpu: bool) -> Any:
        """The result of an operator (`_to_copy`, `zeros_like`, ...) that makes it elsewhere than its arguments are."""
        if to_gpu:
            with self._host:
                found = func(*args, **{**kwargs, "device": torch.device("cpu")})
            return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=_GPU)
        found = func(*args, **{**kwargs, "device": _GPU})
        with self._host:
            return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype)


def is_on_gpu(tensor: Tensor) -> bool:
    """Whether it is a tensor of the simulated GPU. A fake tensor is the host's, and slow to ask for its device."""
    return type(tensor) is not FakeTensor and tensor.is_meta


def tensors(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    found: list[Tensor] = []
    _key(values, found)
    return found


def _key(value: Any, found: list[Tensor]) -> Any:
    """What stands for an argument in the key of a call; its tensors are appended to `found`.

    Shape, stride and dtype for a tensor; a number with its type, as 1 == 1.0 == True.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return tuple([_key(each, found) for each in value])
    if isinstance(value, Tensor):
        found.append(value)
        return value.shape, value.stride(), value.dtype
    if kind is dict:
        return tuple([(name, _key(each, found)) for name, each in value.items()])
    return (kind, value) if kind in _NUMBERS else value


def _description(result: Any, storages: set[int]) -> Any:
    """What `_made` makes the result's like of; _ALIAS if it shares memory with `storages` or within itself."""
    found = [tensor.untyped_storage()._cdata for tensor in tensors(result)]
    if len(set(found)) < len(found) or storages.intersection(found):
        return _ALIAS
    if isinstance(result, (tuple, list)):
        return type(result), [_description(each, set()) for each in result]
    return (Tensor, (result.shape, result.stride(), result.dtype)) if isinstance(result, Tensor) else (None, result)


def _made(description: Any) -> Any:
    kind, what = description
    if kind is Tensor:
        return torch.empty_strided(what[0], what[1], dtype=what[2], device=_GPU)
    return what if kind is None else kind(_made(each) for each in what)


@contextmanager
def gpu_operators() -> Iterator[None]:
    """Attention and RMSNorm as a GPU runs them: flash attention (no S x S matrix) and the fused norm.

    On `meta` torch would decompose both. Attention is sent to `aten._scaled_dot_product_flash_attention`; masks and
    dropout are refused, as no transformer simulated here has any.
    """

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
        assert attn_mask is None and dropout_p == 0.0 and not enable_gqa, "flash attention takes none of these here"
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        result: Tensor = out[0]
        return result

    def rms_norm(
        input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        assert weight is not None and len(normalized_shape) == 1, "the fused norm is over the last dimension"
        result: Tensor = _FusedRMSNorm.apply(input, weight)
        return result

    functional = torch.nn.functional
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attention),
        mock.patch.object(functional, "rms_norm", rms_norm),
    ):
        yield


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
