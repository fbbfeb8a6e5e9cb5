"""safetensors files, both ways, against the format's own library; damaged ones are refused in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from leapalign.engine.memory import tensorfile
from leapalign.engine.memory.tensorfile import check, read_header, read_into, write

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
DTYPES = [
    *FLOATS,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
]
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10
    return values.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


named = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter("__metadata__".__ne__),
    st.tuples(SHAPES, st.sampled_from(DTYPES)),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=named)
def test_the_library_reads_what_is_written(tmp_path: Path, spec: dict[str, Any]) -> None:
    tensors = {name: make(shape, dtype, i) for i, (name, (shape, dtype)) in enumerate(spec.items())}
    write(tmp_path / "x", tensors)
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=named)
def test_what_the_library_writes_is_read(tmp_path: Path, spec: dict[str, Any]) -> None:
    tensors = {name: make(shape, dtype, i) for i, (name, (shape, dtype)) in enumerate(spec.items())}
    save_file(tensors, tmp_path / "x", metadata={"key": "value"})
    header = read_header(tmp_path / "x")
    assert header.metadata == {"key": "value"}
    assert {name: (entry.shape, entry.dtype) for name, entry in header.tensors.items()} == spec
    into = {name: torch.ones(shape, dtype=dtype) for name, (shape, dtype) in spec.items()}
    assert read_into(tmp_path / "x", into) == set(spec)
    assert all(same(into[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("staging", [2**26, 8, 24])
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_a_file_is_cast_as_torch_casts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: torch.dtype, target: torch.dtype, staging: int
) -> None:
    monkeypatch.setattr(tensorfile, "STAGING_BYTES", staging)
    tensors = {"m": make((5, 7), source, 1), "scalar": make((), source, 2), "empty": make((0, 3), source, 3)}
    write(tmp_path / "x", tensors)
    assert all(same(found, tensors[name]) for name, found in load_file(tmp_path / "x").items())
    into = {name: torch.ones(tensor.shape, dtype=target) for name, tensor in tensors.items()}
    read_into(tmp_path / "x", into)
    assert all(same(into[name], tensors[name].to(target)) for name in tensors)


@pytest.mark.parametrize("target", [torch.float32, torch.float64])
def test_tensors_that_are_not_contiguous(tmp_path: Path, target: torch.dtype) -> None:
    source = make((4, 6), torch.float32, 0)
    write(tmp_path / "x", {"a": source.T, "b": source[:, ::2]})
    found = load_file(tmp_path / "x")
    assert same(found["a"], source.T) and same(found["b"], source[:, ::2])
    into = torch.zeros(10, 6, dtype=target)
    read_into(tmp_path / "x", {"a": into[:4].T, "b": into[4:8, ::2]})
    assert torch.equal(into[:4], source.to(target)) and torch.equal(into[4:8, ::2], source[:, ::2].to(target))
    assert not into[4:8, 1::2].any() and not into[8:].any()


def test_a_read_shows_in_the_version_counter(tmp_path: Path) -> None:
    """Overwriting what a graph has saved is an error of autograd's, not a wrong gradient."""
    weight = torch.nn.Parameter(torch.ones(3))
    write(tmp_path / "x", {"w": torch.full((3,), 2.0)})
    loss = weight.square().sum()
    read_into(tmp_path / "x", {"w": weight})
    assert weight.tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_tensor_is_aligned_to_its_width(tmp_path: Path) -> None:
    tensors = {"flag": torch.ones(3, dtype=torch.bool), "half": torch.ones(3).half(), "double": torch.ones(1).double()}
    write(tmp_path / "x", tensors)
    for entry in read_header(tmp_path / "x").tensors.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_a_dtype_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"z is torch\.complex128, .*cast it first"):
        write(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)})
    assert not (tmp_path / "x").exists()


def test_another_models_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.ones(2), "b": torch.ones(2)})
    a = torch.zeros(2)
    with pytest.raises(ValueError, match=r"holds b \(2,\), which is not in this model; it belongs to another model"):
        read_into(tmp_path / "x", {"a": a})
    with pytest.raises(ValueError, match=r"holds b \(2,\), which is \(3,\) in this model"):
        read_into(tmp_path / "x", {"a": a, "b": torch.zeros(3)})
    assert not a.any()
    assert check(tmp_path / "x", {"a": a, "b": a, "c": a}) == {"a", "b"}


def test_every_cut_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "whole", {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    content = (tmp_path / "whole").read_bytes()
    for size in range(len(content)):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut (is cut short|is no safetensors file).*download it again") as error:
            read_header(tmp_path / "cut")
        assert "\n" not in str(error.value)
    (tmp_path / "cut").write_bytes(content + b"x")
    with pytest.raises(ValueError, match="has bytes that belong to no tensor"):
        read_header(tmp_path / "cut")


def entry(dtype: Any = "F32", shape: Any = (1,), data_offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{]", "broken header"),
        (b"\xff\n\xfe", "broken header"),
        (b"[" * 100_000, "broken header"),
        ([], "no JSON object"),
        ({"a": 3}, "broken header"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "data_offsets"),
        ({"__metadata__": "text", "a": entry()}, "broken header"),
        ({"a": entry(dtype="F4")}, "a is of the unknown dtype F4"),
        ({"a": entry(dtype=["F32"])}, "broken header"),
        ({"a": entry(shape=[2])}, r"a of shape \(2,\) takes 8 bytes, not 4"),
        ({"a": entry(shape=[-1, -1])}, "broken header"),
        ({"a": entry(shape=[True])}, "broken header"),
        ({"a": entry(shape=[1.0])}, "broken header"),
        ({"a": entry(shape=3)}, "broken header"),
        ({"a": entry(data_offsets=[-4, 0])}, "broken header"),
        ({"a": entry(data_offsets=[4, 0])}, "broken header"),
        ({"a": entry(data_offsets=[0, 4, 8])}, "broken header"),
        ({"a": entry(data_offsets=[4, 8])}, "a starts at byte"),
        ({"a": entry(), "b": entry()}, "b starts at byte"),
        ({"a": entry(data_offsets=[0, 4]), "b": entry(data_offsets=[8, 12])}, "b starts at byte"),
    ],
)
def test_a_broken_header_is_refused_in_one_line(tmp_path: Path, header: Any, message: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match=message) as error:
        read_header(tmp_path / "x")
    assert "\n" not in str(error.value) and str(tmp_path / "x") in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_byte_gives_one_line_or_a_file_of_the_same_size(tmp_path: Path, data: st.DataObject) -> None:
    write(tmp_path / "x", {"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)})
    content = bytearray((tmp_path / "x").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content)
    message, data_bytes = "", 0
    try:
        entries = read_header(tmp_path / "x").tensors.values()
        data_bytes = sum(math.prod(e.shape) * e.dtype.itemsize for e in entries)
    except ValueError as error:
        message = str(error)
    assert data_bytes == 20 or message.endswith("download it again")
    assert "\n" not in message


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x", {"a": torch.ones(3)})
    fill = tensorfile._fill

    def cut_and_fill(*arguments: Any) -> None:
        with (tmp_path / "x").open("r+b") as other:
            other.truncate(read_header(tmp_path / "x").tensors["a"].start + 8)
        fill(*arguments)

    monkeypatch.setattr(tensorfile, "_fill", cut_and_fill)
    with pytest.raises(ValueError, match="became shorter while it was read"):
        read_into(tmp_path / "x", {"a": torch.zeros(3)})
