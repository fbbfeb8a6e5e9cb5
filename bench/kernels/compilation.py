"""Compiles Triton kernels for GPUs that are not there, and reads from the binaries what they will cost.

    registers, spilled  of a thread, from the cubin: 32-bit registers, and bytes of what did not fit into them
    shared              bytes of shared memory of a program
    accesses            {argument: {"load" or "store": bytes an access}} of global memory, from the PTX

An access belongs to the pointer that its address is a sum of: the PTX is followed back from the address register
through the instructions that wrote it, but not through loads, to the arguments.

The gate: nothing is spilled, and every access to a streamed array moves 16 bytes or more, the most that a thread of a
GPU before Blackwell moves at once. Streamed are all arrays but those of which a row, block or program takes a few
numbers, which the kernel's file names (`Compilation.unstreamed`); 8-bit codes are streamed like any other.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from leapalign.kernels.compilation import Compilation

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # A100, RTX 30x0 and A40, RTX 40x0 and L40, H100, B200, RTX 50x0
FILES = (
    *("leap.prediction", "leap.cotangents"),
    *(f"blocks.{name}" for name in ("modulate", "gated", "gated_modulate", "rows", "qk_norm_rope")),
    *("adamw8bit.kernel", "sum_of_squares"),
)
WIDE = 16  # bytes

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);", re.MULTILINE)
_ADDRESS = re.compile(r"%rd\d+")  # registers of 64 bits
_PARAMETER = re.compile(r"\[\w+_param_(\d+)\]")
_TYPE = re.compile(r"(?:\.v(\d))?\.[busf](\d+)$")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """A kernel of Compilation.name, for sm_<arch>; the other fields as above, widths ascending."""

    name: str
    arch: int
    registers: int
    spilled: int
    shared: int
    accesses: Mapping[str, Mapping[str, Sequence[int]]]
    unstreamed: tuple[str, ...]

    @property
    def widest(self) -> int:
        """Bytes of the widest access."""
        return max(width for kinds in self.accesses.values() for widths in kinds.values() for width in widths)

    @property
    def narrowest_streamed(self) -> int | None:
        """Bytes of the narrowest access to a streamed array; None where nothing is streamed."""
        streamed = [kinds for argument, kinds in self.accesses.items() if argument not in self.unstreamed]
        return min((widths[0] for kinds in streamed for widths in kinds.values()), default=None)

    def faults(self) -> list[str]:
        """What the gate does not let pass."""
        found = [f"{self.spilled} bytes of a thread's registers are spilled"] if self.spilled else []
        for argument, kinds in self.accesses.items():
            for kind, widths in kinds.items():
                if widths[0] < WIDE and argument not in self.unstreamed:
                    found.append(f"a {kind} of {argument} moves {widths[0]} bytes, not {WIDE}")
        return found


def compiled(compilation: Compilation, arch: int) -> Compiled:
    """Compile for sm_<arch>. Triton keeps the binaries in its cache (TRITON_CACHE_DIR)."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature, names = compilation.signature, compilation.kernel.arg_names  # Triton counts arguments in this order
    assert all(signature[name].startswith("*") for name in compilation.unstreamed), compilation.name
    source = triton.compiler.ASTSource(
        fn=compilation.kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in compilation.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in compilation.aligned},
    )
    options = {
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "enable_fp_fusion": compilation.fp_fusion,
    }
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilled = resources(built.asm["cubin"])
    return Compiled(
        name=compilation.name,
        arch=arch,
        registers=registers,
        spilled=spilled,
        shared=built.metadata.shared,
        accesses=accesses(built.asm["ptx"], {name: signature[name] for name in names}),
        unstreamed=compilation.unstreamed,
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread of the only kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    ((registers, stack, local),) = _RESOURCES.findall(text)
    return int(registers), int(stack) + int(local)


def accesses(ptx: str, signature: Mapping[str, str]) -> dict[str, dict[str, list[int]]]:
    """{pointer: {"load" or "store": the different numbers of bytes that its accesses move, ascending}}.

    Args:
        ptx: of one kernel.
        signature: {argument: Triton's type} in the kernel's order; constants are no parameters of the PTX.

    Raises:
        ValueError: an instruction on global memory that is neither a plain load nor a plain store.
    """
    parameters = [name for name, kind in signature.items() if kind != "constexpr"]
    sources: dict[str, set[str]] = defaultdict(set)  # register -> the registers and arguments it is computed from
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    touched = []  # (address register, kind, bytes)
    for operation, operands in _INSTRUCTION.findall(ptx):
        if operation.startswith(("ld.global", "st.global")):
            vector, bits = _TYPE.search(operation).groups()  # type: ignore[union-attr]
            (address,) = _ADDRESS.findall(operands[operands.index("[") : operands.index("]")])
            kind = "load" if operation.startswith("ld") else "store"
            touched.append((address, kind, int(vector or 1) * int(bits) // 8))
        elif "global" in operation and not operation.startswith("cvta"):
            raise ValueError(f"{operation} is neither a plain load nor a plain store: teach bench how wide it is")
        elif operation.startswith("ld.param"):
            (number,) = _PARAMETER.findall(operands)
            sources[operands.partition(",")[0]].add(parameters[int(number)])
        elif not operation.startswith("ld."):
            result, _, rest = operands.partition(",")
            if _ADDRESS.fullmatch(result):
                sources[result].update(_ADDRESS.findall(rest))
    for address, kind, width in touched:
        (pointer,) = (name for name in _origins(address, sources) if signature[name].startswith("*"))
        found[pointer][kind].add(width)
    return {name: {kind: sorted(widths) for kind, widths in found[name].items()} for name in signature if name in found}


def _origins(register: str, sources: Mapping[str, set[str]]) -> set[str]:
    """The arguments that a register is computed from."""
    seen, waiting = {register}, [register]
    while waiting:
        new = sources.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return {name for name in seen if not name.startswith("%")}


# ---- many of them --------------------------------------------------------------------------------------------------


def listed(only: str | None = None) -> list[tuple[str, str]]:
    """(module, name) of every compilation of ours whose name contains `only`, in the files' order."""
    modules = [f"leapalign.kernels.{file}" for file in FILES]
    return [(module, name) for module in modules for name in _of(module) if only is None or only in name]


def compile_all(wanted: Sequence[tuple[str, str]], architectures: Sequence[int]) -> Iterator[list[Compiled]]:
    """Each of (module, name) for all architectures, in turn; one process a core works on them."""
    with _not_interpreted(), ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = [[pool.submit(_compile_listed, *each, arch) for arch in architectures] for each in wanted]
        for job in jobs:
            yield [future.result() for future in job]


def _compile_listed(module: str, name: str, arch: int) -> Compiled:
    return compiled(_of(module)[name], arch)  # by name: kernels do not travel between processes


def _of(module: str) -> dict[str, Compilation]:
    return {compilation.name: compilation for compilation in import_module(module).compilations()}


@contextmanager
def _not_interpreted() -> Iterator[None]:
    """Processes that start in here compile, whatever TRITON_INTERPRET says."""
    given = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["TRITON_INTERPRET"] = given
