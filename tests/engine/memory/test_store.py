"""The store: one layout for every kind, checkpoints straight into it and straight out of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from leapalign.engine.memory import tensorfile
from leapalign.engine.memory.store import BlockStore, Unit

SHAPES = st.lists(st.lists(st.integers(0, 20), max_size=3).map(torch.Size), max_size=6)


def unit(name: str, *shapes: tuple[int, ...]) -> Unit:
    return Unit(name, {f"{name}.{i}": torch.Size(shape) for i, shape in enumerate(shapes)})


def units_of(module: nn.Module) -> list[Unit]:
    """One for each first part of the parameters' names."""
    shapes: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in module.named_parameters():
        shapes.setdefault(name.split(".")[0], {})[name] = parameter.shape
    return [Unit(name, found) for name, found in shapes.items()]


def store_of(module: nn.Module, dtype: torch.dtype) -> BlockStore:
    store = BlockStore(units_of(module), dtype)
    for name, view in store.parameters().items():
        view.copy_(module.get_parameter(name).detach())
    return store


@given(SHAPES)
def test_parameters_start_at_multiples_of_256_elements_and_do_not_overlap(shapes: list[torch.Size]) -> None:
    block = unit("block", *shapes)
    assert list(block.offsets) == list(block.shapes) and block.numel % 256 == 0
    assert all(offset % 256 == 0 for offset in block.offsets.values())
    flat = torch.full((block.numel,), -1.0)
    for i, view in enumerate(block.views(flat).values()):
        assert view.shape == shapes[i] and (view == -1).all()
        view.fill_(i)
    for i, view in enumerate(block.views(flat).values()):
        assert (view == i).all()
    padding = block.numel - sum(shape.numel() for shape in shapes)
    assert (flat == -1).sum() == padding < 256 * max(len(shapes), 1)


def test_kinds_have_one_layout_and_regions_of_their_own() -> None:
    store = BlockStore([unit("a", (3, 5), ()), unit("none"), unit("b", (300,))], torch.bfloat16)
    assert list(store.parameters()) == ["a.0", "a.1", "b.0"]
    assert not any(view.any() for view in store.parameters().values())
    store.allocate("ema", torch.float32)
    for kind, dtype in (("weights", torch.bfloat16), ("ema", torch.float32)):
        assert store.region("a", kind).shape == (512,) and store.region("b", kind).shape == (512,)
        assert store.region("none", kind).shape == (0,)
        assert all(view.dtype == dtype for view in store.views("a", kind).values())
    store.views("a", "ema")["a.1"].fill_(3)
    assert store.region("a", "ema")[256] == 3 and store.region("a", "ema").count_nonzero() == 1
    assert not store.region("a").any() and not store.region("b", "ema").any()


def test_a_kind_is_made_once_and_freed() -> None:
    store = BlockStore([unit("a", (3,))], torch.bfloat16)
    assert store.holds("weights") and not store.holds("held")
    store.allocate("held", torch.float32)
    store.region("a", "held").fill_(1)
    store.allocate("held", torch.float32)
    assert (store.region("a", "held") == 1).all()
    with pytest.raises(ValueError, match=r"held is held in torch\.float32, torch\.bfloat16 was asked for"):
        store.allocate("held", torch.bfloat16)
    store.free("held")
    store.free("held")
    assert not store.holds("held")
    store.allocate("held", torch.bfloat16)
    assert not store.region("a", "held").any()


def test_a_store_of_fake_tensors_needs_no_memory() -> None:
    with FakeTensorMode():
        store = BlockStore(
            [unit("a", (2**20, 2**20), ())],  # 2 TiB
            torch.bfloat16,
            arena=lambda sizes: {name: torch.empty(size, dtype=torch.uint8) for name, size in sizes.items()},
        )
        store.allocate("held", torch.float32)
        weight = store.views("a", "held")["a.0"]
        assert isinstance(weight, FakeTensor) and weight.shape == (2**20, 2**20)
        store.free("held")


FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("saved", FLOATS)
def test_shards_in_any_dtype_are_cast_into_the_store(tmp_path: Path, saved: torch.dtype, held: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    store = BlockStore([unit("a", (3, 5), (), (0, 4)), unit("b", (300,))], held)
    source = {
        name: torch.randn(view.shape, generator=generator, dtype=torch.float64).to(saved)
        for name, view in store.parameters().items()
    }
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({name: source[name] for name in ("b.0", "a.1")}, files[0])  # not in the units' order
    save_file({name: source[name] for name in ("a.2", "a.0")}, files[1])
    store.load(files)
    for name, view in store.parameters().items():
        assert torch.equal(view, source[name].to(held)), name
    inside = sum(tensor.count_nonzero() for tensor in source.values())
    assert sum(store.region(name).count_nonzero() for name in store.units) == inside  # the padding stays zero


def test_another_models_checkpoint_is_refused_and_nothing_is_read(tmp_path: Path) -> None:
    store = BlockStore([unit("a", (2,), (3,))], torch.float32)
    path = tmp_path / "x.safetensors"
    for tensors, message in (
        ({"a.0": torch.ones(2)}, r"1 tensors have no saved value, e\.g\. a\.1; it belongs to another model"),
        ({"a.0": torch.ones(2), "a.1": torch.ones(3), "c": torch.ones(1)}, r"holds c \(1,\), which is not in this"),
        ({"a.0": torch.ones(2), "a.1": torch.ones(4)}, r"holds a\.1 \(4,\), which is \(3,\) in this model"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            store.load([path])
        assert not store.region("a").any()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut short"):
        store.load([path])


def test_one_kind_is_saved_in_shards_with_an_index(tmp_path: Path) -> None:
    store = BlockStore([unit("a", (10,), (10,)), unit("b", (10,), (100,))], torch.bfloat16)
    store.allocate("ema", torch.float32)
    for i, name in enumerate(store.units):
        store.region(name, "ema").fill_(i + 1)
    paths = store.save(tmp_path, stem="model", shard_bytes=80, kind="ema")
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 130}
    assert {name: tmp_path / file for name, file in index["weight_map"].items()} == {
        name: path for path in paths for name in load_file(path)
    }
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert found.keys() == store.parameters().keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and (tensor == (1 if name.startswith("a") else 2)).all()


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["flux-guidance", "sd3"])
def test_diffusers_reads_what_the_store_saves_and_the_reverse(
    tmp_path: Path, make_transformer: Callable[..., nn.Module], family: str, dtype: torch.dtype, shard_bytes: int
) -> None:
    transformer: Any = make_transformer(family, dtype)  # a diffusers model
    expected = transformer.state_dict()
    buffers = dict(transformer.named_buffers())  # SD3's position embedding is in its files
    saved, own = tmp_path / "saved", tmp_path / "own"
    saved.mkdir()

    transformer.save_config(saved)
    files = store_of(transformer, dtype).save(saved, shard_bytes=shard_bytes, buffers=buffers)
    assert (len(files) > 1) == (shard_bytes < 10**9)
    loaded = type(transformer).from_pretrained(saved, torch_dtype=dtype)
    assert_equal_states(loaded.state_dict(), expected)

    transformer.save_pretrained(own, max_shard_size=shard_bytes)
    store = BlockStore(units_of(transformer), dtype)
    found = {name: torch.zeros_like(buffer) for name, buffer in buffers.items()}
    store.load(sorted(own.glob("*.safetensors")), buffers=found)
    assert_equal_states({**store.parameters(), **found}, expected)


LOAD = """
import sys
from pathlib import Path
import torch
from leapalign.engine.memory.arena import HostArena
from leapalign.engine.memory.store import BlockStore, Unit

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

arenas = []
def arena(sizes):
    arenas.append(HostArena(sizes, pin=False))
    return arenas[-1]

shape = torch.Size([4096, 4096])
units = [Unit(f"block{i}", {f"block{i}.{j}": shape for j in range(6)}) for i in range(10)]
torch.ones(10).sum()
before = memory("VmRSS")
store = BlockStore(units, torch.bfloat16, arena=arena)
store.load(sorted(Path(sys.argv[1]).glob("*.safetensors")))
peak = memory("VmHWM") - before
for i, view in enumerate(store.parameters().values()):
    for row, column in ((0, 0), (1234, 567), (4095, 4095)):
        assert view[row, column] == (i + row * 4096 + column) % 251, (i, row, column)
assert 1.9e9 < arenas[0].nbytes < 2.1e9
assert arenas[0].nbytes < peak <= arenas[0].nbytes + 300e6, (arenas[0].nbytes, peak)
"""


def test_loading_2_gigabytes_takes_the_arena_and_little_more(tmp_path: Path) -> None:
    """60 tensors of 32 MiB in six files, whose borders are not the units'; the last file is float32 and is cast."""
    pattern = torch.arange(4096 * 4096 + 60) % 251  # exact in bfloat16
    files = [tmp_path / f"{i}.safetensors" for i in range(6)]
    try:
        for number, path in enumerate(files):
            values = pattern.to(torch.float32 if number == 5 else torch.bfloat16)
            names = range(11 * number, min(11 * number + 11, 60))
            tensorfile.write(path, {f"block{i // 6}.{i % 6}": values[i : i + 4096**2].view(4096, 4096) for i in names})
        script = [sys.executable, "-c", LOAD, str(tmp_path)]
        run = subprocess.run(script, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    finally:
        for path in files:
            path.unlink(missing_ok=True)  # pytest would keep 2 GB for the next three runs
