"""A host and a GPU without memory or arithmetic: what runs here only finds out shapes, dtypes and lifetimes.

The host's tensors are fake (`FakeTensorMode`), of any size. The GPU's are plain `meta` tensors: autograd on fake CUDA
tensors aborts the process where torch has no CUDA, and `FakeTensorMode` takes 0.2 ms an operator, ten minutes for one
step of a 12B model. The shapes that an operator returns depend on its arguments alone, so they are remembered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from leapalign.engine.planning.counting import Call, Observer, is_on_gpu, key_of, tensors

_GPU = torch.device("meta")
_ALIAS = object()  # the result shares memory with an argument: it has to be made by the operator each time


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
        key = (func, key_of(args, given), key_of(kwargs, given) if kwargs else None)
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
