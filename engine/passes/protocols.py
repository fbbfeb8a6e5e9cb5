"""What autograd's node, the optimizer and the export ask of a streamed model, and what it asks of an optimizer.

Types alone: `leapalign.engine.model.StreamedModel` and `leapalign.engine.optimizer.adamw8bit.AdamW8bit` are the ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from leapalign.engine.ledger import Ledger
from leapalign.engine.memory.store import BlockStore
from leapalign.engine.passes.evaluation import Leg, ModulationRows, Modulations, Record
from leapalign.engine.passes.held_sums import HeldSums
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import Gradients, Sink
from leapalign.engine.streaming.streamer import Streamer
from leapalign.engine.streaming.weights import Weights


class Fused(Protocol):
    """An optimizer that can update inside the backward pass."""

    @property
    def fused_backward(self) -> bool: ...

    def fused(self) -> AbstractContextManager[Sink]:
        """The sink of this step's backward pass."""
        ...


class Streamed(Protocol):
    """A model whose weights are in a store and visit the device; see `StreamedModel` for what each does."""

    module: nn.Module
    plan: MemoryPlan
    device: torch.device
    store: BlockStore
    sums: HeldSums
    ledger: Ledger

    @property
    def fused_optimizer(self) -> Fused | None: ...

    @property
    def streamer(self) -> Streamer: ...

    @property
    def weights(self) -> Weights: ...

    @property
    def gradients(self) -> Gradients: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def weights_version(self) -> int: ...

    def weights_changed(self, unit: str, /) -> None: ...

    def refresh(self) -> None: ...

    def hoist(self, inputs: Mapping[str, Tensor], /) -> Modulations | None: ...

    def record(self, rows: int, /) -> Record: ...

    def evaluate(
        self,
        inputs: Mapping[str, Any],
        /,
        *,
        modulations: ModulationRows | None = None,
        record: Record | None = None,
        record_rows: Sequence[tuple[int, int]] = (),
    ) -> Tensor: ...

    def vjp(
        self,
        legs: Sequence[Leg],
        /,
        *,
        params: Literal["none", "accumulate", "deliver"] = "none",
        sink: Sink | None = None,
    ) -> list[dict[str, Tensor]]: ...

    def products(
        self, legs: Sequence[Leg], params: str, kind: str, sink: Sink | None, /
    ) -> list[dict[str, Tensor]]: ...
