"""The model's weights and states on the host: one contiguous region for every block, its parameters views of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from leapalign.engine.memory import tensorfile
from leapalign.engine.memory.arena import HostArena
from leapalign.engine.memory.checkpoint import load_into, split

ALIGNMENT = 256  # elements: quantisation blocks of the 8-bit moments; at least 16 bytes for vector loads
FILE_BYTES = 10 * 10**9  # diffusers' own limit for a file of a saved model


@dataclass(frozen=True)
class Unit:
    """Parameters that travel to the device and back together: a block's, usually.

    The layout is the same, in elements, for weights, gradients and states: parameters in the order of `shapes`, each
    from a multiple of 256 elements on, so that a block of 256 never holds elements of two.

    Attributes:
        name: of the unit, e.g. "transformer_blocks.3".
        shapes: {full name in the model: shape}; 0-d and empty parameters are allowed.
    """

    name: str
    shapes: Mapping[str, torch.Size]

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        """{full name: first element}."""
        return MappingProxyType(self._layout[0])

    @cached_property
    def numel(self) -> int:
        """Elements of a region, padding included: a multiple of 256."""
        return self._layout[1]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """{full name: view of flat in the parameter's shape}, for flat (numel,) of any dtype and device."""
        assert flat.shape == (self.numel,), f"{self.name} has {self.numel} elements, not {tuple(flat.shape)}"
        return {
            name: flat[start : start + math.prod(shape)].view(shape)
            for (name, shape), start in zip(self.shapes.items(), self.offsets.values(), strict=True)
        }

    @cached_property
    def _layout(self) -> tuple[dict[str, int], int]:
        offsets, end = {}, 0
        for name, shape in self.shapes.items():
            offsets[name] = end
            end += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        return offsets, end


class BlockStore:
    """Host memory for the weights of all units and, on demand, for more of the same layout: a *kind*, e.g. "held"
    gradients, "moments", "ema", "residual". A kind is one arena with a region for each unit.

    Making a store, its regions and views touches no memory; with another `arena` they may be fake tensors.

    Args:
        units: in the order in which the model runs; no parameter is in two.
        dtype: of the weights.
        arena: makes {region: 1-D uint8 tensor} of {region: bytes}.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        dtype: torch.dtype,
        *,
        arena: Callable[[Mapping[str, int]], Mapping[str, Tensor]] = HostArena,
    ) -> None:
        self.units: Mapping[str, Unit] = MappingProxyType({unit.name: unit for unit in units})
        self.dtype = dtype
        names = [name for unit in units for name in unit.shapes]
        assert len(self.units) == len(units), "two units have one name"
        assert len(set(names)) == len(names), "a parameter is in two units"
        self._make_arena = arena
        self._arenas: dict[str, Mapping[str, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.allocate("weights", dtype)

    def allocate(self, kind: str, dtype: torch.dtype, *, per: int = 1) -> None:
        """Make a zero region of `dtype` for every unit; nothing if the kind is there already with this dtype.

        Args:
            per: elements of the unit for one of the region, a divisor of 256: 256 for the scales of quantised blocks.

        Raises:
            ValueError: it is there with another dtype.
        """
        assert ALIGNMENT % per == 0, f"{per} does not divide {ALIGNMENT}"
        if not self.holds(kind):
            sizes = {unit.name: unit.numel // per * dtype.itemsize for unit in self.units.values()}
            self._arenas[kind] = self._make_arena(sizes)
            self._dtypes[kind] = dtype
        elif self._dtypes[kind] != dtype:
            raise ValueError(f"{kind} is held in {self._dtypes[kind]}, {dtype} was asked for; free it first")

    def holds(self, kind: str) -> bool:
        """Whether there is memory of this kind."""
        return kind in self._arenas

    def free(self, kind: str) -> None:
        """Give a kind's memory back, as soon as no view of it is left; nothing if it is not there."""
        arena = self._arenas.pop(kind, None)
        self._dtypes.pop(kind, None)
        if isinstance(arena, HostArena):
            arena.close()

    def region(self, unit: str, kind: str = "weights") -> Tensor:
        """(units[unit].numel,) host tensor in the kind's dtype, padding included; (numel / per,) if made with `per`."""
        return self._arenas[kind][unit].view(self._dtypes[kind])

    def views(self, unit: str, kind: str = "weights") -> dict[str, Tensor]:
        """{full name: view} of one unit's parameters."""
        return self.units[unit].views(self.region(unit, kind))

    def parameters(self) -> dict[str, Tensor]:
        """{full name: view} of all weights, in the order of the units."""
        return {name: view for unit in self.units for name, view in self.views(unit).items()}

    def load(self, files: Sequence[Path], *, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Read the weights from safetensors files, straight into their regions, cast where the file's dtype differs.

        Args:
            files: all shards of one checkpoint.
            buffers: {full name: tensor} that the files hold beside the parameters (SD3's position embedding); filled.

        Raises:
            ValueError: a name or a shape that is missing, unknown or different, and nothing has been read; or a file
                is damaged.
        """
        load_into({**self.parameters(), **(buffers or {})}, files)

    def save(
        self,
        folder: Path,
        *,
        stem: str = "diffusion_pytorch_model",
        shard_bytes: int = FILE_BYTES,
        kind: str = "weights",
        buffers: Mapping[str, Tensor] | None = None,
    ) -> list[Path]:
        """Write one kind under diffusers' names for a model's weights, from where it is: there is no second copy.

        One file, stem.safetensors, if `shard_bytes` allow; else stem-00001-of-00003.safetensors, ... and
        stem.safetensors.index.json.

        Args:
            folder: exists; files of another number of shards in it are left.
            stem: "diffusion_pytorch_model" for diffusers, "model" for transformers.
            shard_bytes: a file holds no more, unless a single tensor does.
            kind: e.g. "weights" or "ema".
            buffers: {full name: tensor} to be written beside the parameters.

        Returns:
            The safetensors files written.
        """
        tensors = {name: view for unit in self.units for name, view in self.views(unit, kind).items()}
        tensors |= buffers or {}
        shards = list(split(tensors, shard_bytes))
        paths = [folder / f"{stem}.safetensors"]
        if len(shards) > 1:
            paths = [folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
            }
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path, shard in zip(paths, shards, strict=True):
            tensorfile.write(path, shard)
        return paths
