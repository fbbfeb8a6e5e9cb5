"""Which files decide a result, so that the report can say when they have changed since it was measured.

Only the files whose arithmetic, bytes or speed a benchmark states: a change elsewhere leaves its numbers true. Of
Python files comments, docstrings, imports and blank lines do not count, of C++ lines that include, of all the file's
name and files without code: what only moved is what it was.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
_EMPTY = hashlib.sha256(b"").hexdigest()[:8]

_METHOD = ["leapalign/gradients.py", "leapalign/executors/autograd.py"]
_METHOD += [f"leapalign/method/{name}.py" for name in ("reward_gradient", "leapalign", "surrogates", "trajectory")]
_DRAWN = ["leapalign/method/schedule.py", "leapalign/method/draws.py"]
_TRAINED = [*_METHOD, *_DRAWN, "leapalign/run/trainer.py"]
_PACKAGED = ["leapalign/config/presets/shapes.yaml", "leapalign/zoo/shapes/pipeline/training.json"]
_EIGHT_BIT = ["kernels/adamw8bit/definition.py", "kernels/adamw8bit/quantize.py", "kernels/rounding.py"]
_STEP = [
    "engine/backbones/*.py",
    "engine/memory/store.py",
    "engine/memory/module_visit.py",
    "engine/model.py",
    *(f"engine/passes/{name}.py" for name in ("backward", "evaluation", "forward", "held_sums", "hoisting", "vjp")),
    "engine/planning/planned_step.py",
    "engine/streaming/*.py",
    "leapalign/executors/streamed.py",
]
_HOST = ["kernels/adamw8bit/host.py", "kernels/host/*.py", "kernels/host/csrc/*", "kernels/host/csrc/*/*"]
_UPDATE = ["engine/optimizer/adamw8bit.py", "engine/optimizer/update.py", *_EIGHT_BIT, *_HOST]
_TRITON = [
    "kernels/adamw8bit/device.py",
    "kernels/adamw8bit/kernel.py",
    "kernels/blocks/*.py",
    "kernels/leap/cotangents.py",
    "kernels/leap/prediction.py",
    "kernels/sum_of_squares.py",
]
_ROUNDING = ["kernels/rounding.py", "kernels/adamw8bit/quantize.py", "kernels/pairwise_sum.py"]
_COUNTED = [f"bench/memory/{name}.py" for name in ("simulate", "devices", "one_graph", "live_tensors", "trajectory_*")]
_PLAN = [f"engine/planning/{name}.py" for name in ("planner", "costs", "stage_costs", "footprint", "traffic")]
_WAYS = [
    f"bench/speed/{name}.py"
    for name in ("step_variants", "device_variants", "random_models", "step_timing", "movement")
]
_WAYS += _METHOD
_WAYS += ["leapalign/executors/reference.py"]
_RATES = ["engine/planning/rates.py", "engine/planning/counting.py"]
_OPERATIONS = [f"bench/kernels/{name}.py" for name in ("cases", "timing", "optimizer_cases")]
_STAGES = [
    "bench/memory/trajectory_*.py",
    "bench/memory/one_graph.py",
    "bench/gpu/correctness.py",
    "bench/gpu/ballast.py",
]

# first word of the command -> what it runs; of every command that measures
DEPENDS: Mapping[str, list[str]] = {
    "quality": [*_TRAINED, *_PACKAGED, *_EIGHT_BIT],
    "curves": [*_TRAINED, *_PACKAGED, *_EIGHT_BIT],
    "optimizers": [*_METHOD, *_PACKAGED, *_EIGHT_BIT],
    "tracking": [*_EIGHT_BIT, *_PACKAGED[1:], "bench/training/optimizer_steps.py"],
    "optimizer-states": [*_UPDATE[:2], "engine/memory/store.py", "kernels/adamw8bit/quantize.py"],
    "bits": [*_METHOD, *_DRAWN, *_STEP, *_UPDATE, *_PACKAGED[1:]],
    "memory": [*_STEP, *_COUNTED, "engine/planning/counting.py"],
    "throughput": [*_STEP, *_TRITON, *_UPDATE, *_PLAN, *_WAYS, *_RATES],
    "gpu": [*_STEP, *_TRITON, *_ROUNDING, *_UPDATE, *_PLAN, *_WAYS, *_RATES, *_OPERATIONS, *_STAGES],
    "kernels": [*_TRITON, *_ROUNDING, *_OPERATIONS, "bench/kernels/compilation.py"],
    "host-optimizer": [*_HOST, *_EIGHT_BIT, "bench/speed/host_optimizer.py"],
}


def digests(what: str, root: Path = ROOT) -> dict[str, str]:
    """{file: digest} of what the benchmark of that name depends on."""
    files = sorted({path for pattern in DEPENDS[what] for path in root.glob(pattern) if path.is_file()})
    found = {path.relative_to(root).as_posix(): digest(path) for path in files}
    return {name: value for name, value in found.items() if value != _EMPTY}


def changed(what: str, recorded: Mapping[str, str], root: Path = ROOT) -> list[str]:
    """Files of which the contents are new, or gone, since digests were recorded; one that only moved is neither."""
    now = digests(what, root)
    new, gone = (Counter(a.values()) - Counter(b.values()) for a, b in ((now, recorded), (recorded, now)))
    found = {name for name, digest in now.items() if digest in new and recorded.get(name) != digest}
    return sorted(found | {name for name, digest in recorded.items() if digest in gone and now.get(name) != digest})


def digest(path: Path) -> str:
    """Eight hexadecimal digits of a file's contents; of Python, of its code."""
    return _digest(path.read_bytes(), path.suffix)


@functools.cache  # many results depend on one file
def _digest(contents: bytes, suffix: str) -> str:
    if suffix == ".py":
        contents = _code(contents.decode()).encode()
    elif suffix in (".h", ".cpp"):
        contents = b"".join(line for line in contents.splitlines(True) if not line.startswith(b"#include"))
    return hashlib.sha256(contents).hexdigest()[:8]


def _code(text: str) -> str:
    """Lines without comments, docstrings and imports; by position, so that every version of Python finds the same."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        left_out: ast.stmt | None = node if isinstance(node, (ast.Import, ast.ImportFrom)) else None
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            left_out = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
        if left_out is not None:
            first, last = left_out.lineno, left_out.end_lineno or left_out.lineno
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
