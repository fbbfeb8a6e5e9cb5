"""Checkpoints: folders that are whole or absent, and optimizer states in safetensors.

A folder is written beside its place, brought to the disk and renamed. The rename is the commit: a process killed at any
instant leaves either the old state or the new one, and remains of the attempt that `clean` removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from leapalign.engine.memory import tensorfile

STATE_FILE = "trainer_state.json"
SHARD_BYTES = 4 * 10**9  # a file of optimizer states holds no more, unless a single tensor does
_UNFINISHED, _REPLACED, _DISCARDED = ".unfinished", ".replaced", ".discarded"


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; at the block's end it becomes `folder`, replacing what was there.

    If the block raises, nothing has changed.
    """
    clean(folder.parent)
    draft, replaced = _hidden(folder, _UNFINISHED), _hidden(folder, _REPLACED)
    draft.mkdir(parents=True)
    try:
        yield draft
        _sync(draft)
        if folder.exists():
            folder.rename(replaced)  # killed here: `clean` puts it back
        draft.rename(folder)
        _sync_entry(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's contents by `text`, or leave it as it was."""
    draft = path.with_name(f".{path.name}{_UNFINISHED}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def clean(parent: Path) -> None:
    """Remove what a killed process left in `parent`, and put back a folder that it was about to replace."""
    for replaced in parent.glob(f".*{_REPLACED}"):
        folder = parent / replaced.name.removeprefix(".").removesuffix(_REPLACED)
        if not folder.exists():
            replaced.rename(folder)
    for suffix in (_UNFINISHED, _REPLACED, _DISCARDED):
        for leftover in parent.glob(f".*{suffix}"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """output_dir/checkpoint-000050"""
    return output_dir / f"checkpoint-{step:06d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in `output_dir`, the oldest step first."""
    found = [
        (int(match[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def prune(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (at least 1); None keeps all."""
    for path in list_checkpoints(output_dir)[: -max(limit, 1)] if limit is not None else []:
        discarded = _hidden(path, _DISCARDED)
        path.rename(discarded)  # so that a half-deleted checkpoint is never taken for a whole one
        shutil.rmtree(discarded)


def save_tensors(tensors: Mapping[str, Tensor], folder: Path, *, stem: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write {name: tensor} as stem-00001.safetensors, ..., without a copy of what is on the host."""
    for number, shard in enumerate(split(tensors, shard_bytes), 1):
        tensorfile.write(folder / f"{stem}-{number:05d}.safetensors", shard)


def split(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Consecutive parts of at most `shard_bytes`, or of one tensor; a part without tensors if there are none."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def load_into(tensors: Mapping[str, Tensor], files: Iterable[Path]) -> None:
    """Copy tensors from safetensors files into those of the same name, in place, cast to their dtype and device.

    Raises:
        ValueError: a name or a shape that is missing, unknown or different, and nothing has been copied; or a file is
            damaged. The message names it.
    """
    paths = list(files)
    missing = set(tensors)
    for path in paths:
        missing -= tensorfile.check(path, tensors)
    if missing:
        raise ValueError(
            f"{len(missing)} tensors have no saved value, e.g. {min(missing)}; it belongs to another model"
        )
    for path in paths:
        tensorfile.read_into(path, tensors)


def model_files(folder: Path) -> list[Path]:
    """The safetensors files of a diffusers model folder."""
    return sorted(folder.glob("diffusion_pytorch_model*.safetensors"))


def save_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], folder: Path) -> None:
    """Write tensors as `parameter name/state name` in safetensors, and everything else as optimizer.json.

    Args:
        names: {parameter: name} for every parameter of the optimizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            name = f"{names[parameter]}/{key}"
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                scalars[name] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    save_tensors(tensors, folder, stem="optimizer")
    (folder / "optimizer.json").write_text(json.dumps({"scalars": scalars, "groups": groups}, indent=1) + "\n")


def load_optimizer(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], folder: Path) -> None:
    """Restore every state that `save_optimizer` wrote, bit for bit.

    Tensors go to their parameter's device, where a fused torch optimizer keeps all of them, its step counts included.
    The groups' settings stay those the optimizer was made with: the run's config rules them.

    Raises:
        ValueError: states of a parameter that this optimizer does not have.
    """
    parameters = {name: parameter for parameter, name in names.items()}
    saved = json.loads((folder / "optimizer.json").read_text())
    restored: dict[Tensor, dict[str, Any]] = {}

    def put(full_name: str, value: Any) -> None:
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise ValueError(
                f"{folder} holds states of {name}, which is not in this model; it belongs to another model"
            )
        restored.setdefault(parameters[name], {})[key] = value

    for full_name, value in saved["scalars"].items():
        put(full_name, value)
    with ExitStack() as stack:
        for path in sorted(folder.glob("optimizer-*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            for full_name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name = full_name.rpartition("/")[0]
                device = parameters[name].device if name in parameters else "cpu"
                put(full_name, file.get_tensor(full_name).to(device, copy=True))
    optimizer.state.clear()
    optimizer.state.update(restored)


def _hidden(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}{suffix}")


def _sync(folder: Path) -> None:
    """Bring a folder's files to the disk, so that the rename cannot reach it before them."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
