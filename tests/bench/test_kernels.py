"""The gate on compiled kernels lets ours pass and stops bad ones; the benchmark's code runs, but for the device."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench.__main__ import main
from bench.kernels import command as kernels
from bench.kernels import compilation as kernel_compilation
from bench.kernels import optimizer_cases
from bench.kernels.cases import Shapes, cases
from bench.kernels.command import _TINY
from bench.kernels.compilation import FILES, Compiled, accesses, compiled
from leapalign.kernels.compilation import Compilation
from leapalign.kernels.dispatch import INTERPRETED, jit, tl, triton

compiles = pytest.mark.skipif(triton is None or INTERPRETED, reason="needs Triton, without TRITON_INTERPRET=1")

# Every kernel once, in its largest bfloat16 configuration; `python -m bench kernels --compile-only` takes all of them.
LARGEST = (
    "leap stored bf16, velocities bf16",
    "leap weights two legs",
    "cotangents both bf16, model bf16",
    "modulate.forward bf16 3072",
    "modulate.backward bf16 3072",
    "gated.forward bf16 3072",
    "gated.backward bf16 3072",
    "gated_modulate.forward bf16 3072",
    "gated_modulate.backward bf16 3072",
    "rows.sum_groups bf16",
    "qk_norm_rope forward FLUX bf16",
    "qk_norm_rope backward FLUX bf16",
    "qk_norm_rope weights FLUX bf16",
    "adamw8bit.update residual, gradient fp32, average bf16",
    "sum_of_squares.square bf16",
    "sum_of_squares.add",
)


def ours() -> dict[str, Compilation]:
    modules = [f"leapalign.kernels.{file}" for file in FILES]
    return {name: c for module in modules for name, c in kernel_compilation._of(module).items()}


# ---- the gate ------------------------------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize("arch", [80, 120])
@pytest.mark.parametrize("name", LARGEST)
def test_our_kernels_pass(name, arch):
    result = compiled(ours()[name], arch)
    assert result.faults() == []
    assert result.narrowest_streamed is None or result.narrowest_streamed >= 16  # the same, without `faults`


@compiles
def test_every_kernel_is_among_the_largest():
    """Fails for a new kernel that nobody listed."""
    assert {c.kernel.fn for c in ours().values()} == {ours()[name].kernel.fn for name in LARGEST}


@jit
def _centre(x_ptr, y_ptr, N: tl.constexpr):
    """All x are alive until their mean is known."""
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x - tl.sum(x) / N)


@jit
def _every_second(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + 2 * at))


@jit
def _count(x_ptr, y_ptr, N: tl.constexpr):
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N))))


def toy(kernel, elements, **options) -> Compilation:
    # not in the kernel's order: the gate has to go by names
    signature = {"N": "constexpr", "y_ptr": "*fp32", "x_ptr": "*fp32"}
    return Compilation("toy", kernel, signature, {"N": elements}, aligned=("x_ptr", "y_ptr"), **options)


@compiles
def test_a_kernel_that_spills_is_stopped():
    """16,384 floats in one warp are 512 a thread, which has at most 255 registers."""
    (fault,) = compiled(toy(_centre, 16384, num_warps=1), 90).faults()
    assert "spilled" in fault and int(fault.split()[0]) >= 4 * (512 - 255)
    assert compiled(toy(_centre, 1024, num_warps=1), 90).faults() == []


@compiles
def test_narrow_accesses_are_stopped():
    result = compiled(toy(_every_second, 1024), 80)
    assert result.accesses == {"x_ptr": {"load": [4]}, "y_ptr": {"store": [16]}}
    assert result.faults() == ["a load of x_ptr moves 4 bytes, not 16"]
    assert (result.widest, result.narrowest_streamed) == (16, 4)
    excepted = compiled(toy(_every_second, 1024, unstreamed=("x_ptr",)), 80)
    assert excepted.faults() == [] and excepted.narrowest_streamed == 16


@compiles
def test_contraction_is_as_the_launcher_has_it():
    """The 8-bit AdamW is exact to the bit only without it; the option has to reach the compiler."""
    assert not ours()["adamw8bit.update bf16, gradient bf16"].fp_fusion
    assert all(c.fp_fusion for name, c in ours().items() if not name.startswith("adamw8bit"))


@compiles
def test_other_instructions_on_memory_are_not_passed_over():
    with pytest.raises(ValueError, match=r"atom\.global\S* is neither a plain load nor a plain store"):
        compiled(toy(_count, 1024), 80)


def test_an_access_belongs_to_the_pointer_in_its_address():
    """Through sums, loop counters (registers with two writers) and integer arguments; not through loads."""
    ptx = """
        ld.param.b64 	%rd1, [kernel_param_0];
        ld.param.b64 	%rd2, [kernel_param_1];
        ld.param.s32 	%rd3, [kernel_param_2];
        @%p1 ld.global.b64 { %rd4 }, [ %rd1 + 0 ];
        add.s64 	%rd5, %rd2, %rd4;
        setp.lt.s64 	%p2, %rd5, %rd1;
        mov.b64 	%rd6, %rd5;
        mad.lo.s64 	%rd6, %rd3, 4, %rd6;
        @!%p2 st.global.L1::evict_last.v2.b32 [ %rd6 + 16 ], { %r1, %r2 };
        ld.shared.b64 	%rd2, [%r1];
    """
    found = accesses(ptx, {"index_ptr": "*i64", "N": "constexpr", "y_ptr": "*fp32", "stride": "i32"})
    assert found == {"index_ptr": {"load": [8]}, "y_ptr": {"store": [8]}}


# ---- the command ---------------------------------------------------------------------------------------------------


@compiles
def test_compile_only_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    """In processes of its own, which compile although this one is told to interpret."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "compiled.json"
    chosen = ["--only", "rows.sum_groups bf16", "--arch", "80", "90"]
    assert main(["kernels", "--compile-only", *chosen, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["command"] == "python -m bench kernels --compile-only --arch 80 90 --only 'rows.sum_groups bf16'"
    assert found["faults"] == [] and found["architectures"] == [80, 90]
    (kernel,) = found["kernels"]
    assert kernel["name"] == "rows.sum_groups bf16" and kernel["unstreamed"] == ["out_ptr"]
    assert set(kernel["built"]) == {"sm_80", "sm_90"}
    built = kernel["built"]["sm_90"]
    assert f"90: {built['registers']}/0/{built['shared_bytes']}" in capsys.readouterr().out
    assert built["spilled_bytes"] == 0 and built["widest_access_bytes"] == built["narrowest_streamed_bytes"] == 16


@compiles
def test_a_kernel_that_fails_is_one_line_and_exit_code_1(capsys, monkeypatch):
    bad = Compiled("leap", 80, 255, 64, 0, {"x_ptr": {"load": [2, 16], "store": [16]}}, ())
    monkeypatch.setattr(kernel_compilation, "compile_all", lambda wanted, architectures: [[bad]])
    assert main(["kernels", "--compile-only", "--only", "leap stored", "--arch", "80"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fails:")]
    assert "leap, sm_80: 64 bytes of a thread's registers are spilled; a load of x_ptr moves 2 bytes, not 16" in line


def test_without_a_gpu_there_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench kernels: error: needs a CUDA GPU; --compile-only works without, --tiny on the CPU with toy sizes"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile-only", "--only", "nothing"], "only=nothing is in no kernel's name"),
        (["--tiny", "--only", "nothing"], "only=nothing is in no operation's name"),
        (["--tiny", "--json", "here.txt"], "json=here.txt: give a file NAME.json"),
        (["--tiny", "--fast"], "unknown argument --fast"),
    ],
)
def test_wrong_settings(arguments, message, capsys):
    assert main(["kernels", *arguments]) == 2
    assert message in capsys.readouterr().err


# ---- the measurements ----------------------------------------------------------------------------------------------


def test_tiny_runs_every_operation(tmp_path):
    """What others there are depends on what is installed, but ours, eager and compiled code always run."""
    path = tmp_path / "tiny.json"
    assert main(["kernels", "--tiny", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {"date", "command", "machine", "versions", "device", "tiny", "others", "operations"} <= set(found)
    assert found["device"] == "cpu" and found["tiny"] and found["command"] == "python -m bench kernels --tiny"
    directions = [f"{name} {way}" for name in ("modulate", "gated", "gated_modulate", "qk_norm_rope") for way in WAYS]
    others = ["leap", "leap, distances only", "cotangents", "adamw8bit", "sum_of_squares"]
    assert {row["operation"] for row in found["operations"]} == {*directions, *others}
    for row in found["operations"]:
        assert {"resolution", "dtype", "moved_bytes", "sets_of_inputs", "copy", "ways"} <= set(row)
        assert row["copy"]["bytes_per_second"] * row["copy"]["seconds"] == pytest.approx(row["moved_bytes"])
        for way in ("leapalign", "torch eager", "torch.compile"):
            measured = row["ways"][way]
            assert measured["bytes_per_second"] * measured["seconds"] == pytest.approx(row["moved_bytes"])
            assert measured["of_copy"] * measured["seconds"] == pytest.approx(row["copy"]["seconds"])
            # bfloat16 rounds by 2^-8, a few times one after the other; another operation is off by the order of 1
            assert measured["error"] < 2**-5, (row["operation"], way)


def test_an_operation_that_fails_takes_none_along(tmp_path, monkeypatch, capsys):
    """Ours in one of three, and the copy in another: rows say so, the third is measured, the exit code is 1."""

    def broken(*arguments):
        raise RuntimeError("misaligned address\nmore of it")

    def three(shapes, device):
        first, second, third = list(cases(shapes, device))[:3]
        some = ("leapalign", "torch eager")
        first, third = (replace(case, ways={way: case.ways[way] for way in some}) for case in (first, third))
        first = replace(first, ways={**first.ways, "leapalign": broken})
        yield from (first, replace(second, moved=-4), third)  # no copy has so many bytes

    monkeypatch.setattr(kernels.kernel_cases, "cases", three)
    monkeypatch.setattr(kernels.optimizer_cases, "cases", lambda shapes, device: iter(()))
    path = tmp_path / "tiny.json"
    assert main(["kernels", "--tiny", "--json", str(path)]) == 1
    found = json.loads(path.read_text())
    first, third = found["operations"]
    assert first["faults"] == ["RuntimeError: misaligned address"]
    assert first["ways"]["leapalign"] == {"absent": "RuntimeError: misaligned address"}
    assert first["ways"]["torch eager"]["seconds"] > 0 and third["ways"]["leapalign"]["seconds"] > 0
    assert "faults" not in third
    (second,) = found["failed"]
    assert "ways" not in second and second["faults"][0].startswith("RuntimeError: ")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fails: ")]
    assert told[0].startswith(f"fails: {first['operation']} ") and len(told) == 2


WAYS = ("forward", "backward")


def test_the_bytes_are_those_of_the_large_tensors():
    """Of all operations whose inputs and outputs are all that they read and write; 256 numbers and more are large."""
    shapes = Shapes(64, **_TINY)
    device = torch.device("cpu")
    counted = []
    for case in [*cases(shapes, device), *optimizer_cases.cases(shapes, device)]:
        if "backward" in case.name or case.name == "adamw8bit":
            continue
        tensors = case.inputs(torch.Generator().manual_seed(0))
        written = [result for result in case.exact(tensors) if result.numel() >= 256]
        read = [tensor for tensor in tensors if tensor.numel() >= 256]
        size = sum(tensor.nbytes for tensor in read) + tensors[0].itemsize * sum(result.numel() for result in written)
        assert case.moved == size, case.name
        counted.append(case.name)
    assert len(counted) == 4 + 2 * 3 + 2
