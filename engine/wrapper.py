"""A module in place of another one, whose parameters keep their names and stay where they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn


class Wrapper(nn.Module):
    """Everything that is not defined on the wrapper is the wrapped module's.

    Attributes:
        module: the wrapped one; no submodule, so that its parameters keep their names.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.module.named_parameters(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        yield from self.module.named_modules(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        yield from self.module.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies into the store; `assign` would take the parameters out of it."""
        if assign:
            raise ValueError("assign=True would take the weights out of the streamed store; use assign=False")
        return self.module.load_state_dict(state_dict, strict=strict)

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        self.module.train(mode)
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Stays where it is: weights on the host, computation on `device`.

        Raises:
            ValueError: another dtype; convert the transformer before it is wrapped.
        """
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        own = next(self.module.parameters()).dtype
        if dtype is not None and dtype != own:
            raise ValueError(f"dtype={dtype}: the streamed weights are {own}; convert the transformer, then wrap it")
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise ValueError("the weights of a streamed model stay in its store; convert the transformer, then wrap it")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "module" not in self.__dict__:
                raise
            return getattr(self.__dict__["module"], name)
