"""Peak memory against the number of differentiated steps: full backpropagation, LeapAlign in one graph, the engine.

See bench/memory/trajectory_points.py for the methods. The tiny model is measured with real tensors, each point in a
process of its own; the large ones are counted on fake tensors, or with --gpu measured where they fit. Batch, resolution
and depth are axes: of each the first value is that of the curves over length, and the others are taken at two
differentiated steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

import torch

from bench import record
from bench.memory.growth import fit, spread
from bench.memory.simulate import SEED, Workload
from bench.memory.trajectory_measured import allocated, measure
from bench.memory.trajectory_points import ENGINE, METHODS, count, exists
from leapalign.engine.plan import MemoryPlan
from leapalign.families.flux import FLUX1_DEV
from leapalign.families.sd3 import SD35_MEDIUM

Point = Callable[[Workload, str], Mapping[str, float]]

AXIS_LENGTH = 2  # LeapAlign's: every method has it
_MIB = 2**20
_FIELDS = ("peak_bytes", "host_bytes", "resident_bytes", "forwards_per_image")
_INCLUDED = (
    "weights, weight gradients in the weights' dtype, activations and what autograd keeps; no optimizer states and no "
    "reward. The engine's peak is what it holds on the device: slots for visiting blocks, one block's gradients "
    "and activations; all weights, gradients and block inputs that wait are its host_bytes, as are the latents"
)
_HOW = {
    "on a GPU": "real tensors on the GPU that is named. peak_bytes: the most that torch's allocator gave out; null "
    "where the GPU was too small",
    "measured": "real tensors on the CPU. peak_bytes, host_bytes: live tensors, seen where operators are dispatched. "
    "resident_bytes: the process's own peak above what it had before the model was made, device's and host's part",
    "counted": "fake tensors. peak_bytes: live tensors of a simulated GPU. host_bytes: what the plan predicts, the "
    "optimizer's place taken by float32 gradients",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What `--model` names.

    Attributes:
        workload: makes its workload of the rest.
        architecture: makes the arguments of its diffusers class.
        resolution: pixels a side by default.
        how: "measured" or "counted".
    """

    workload: Callable[..., Workload]
    architecture: Callable[[], Mapping[str, Any]]
    resolution: int
    how: str


def _shapes() -> Mapping[str, Any]:
    folder = resources.files("leapalign.zoo.shapes") / "pipeline" / "transformer"
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if name in FLUX1_DEV or name == "_class_name"}


def _tiny(**settings: Any) -> Workload:
    return Workload(text_tokens=9, patch=8, dtype=torch.float32, **settings)


def _sd3(**settings: Any) -> Workload:
    return Workload(text_tokens=333, **settings)  # 77 of CLIP, 256 of T5


MODELS = {
    # Four times the resolution it was trained at, so that activations outweigh weights, as in the large models.
    "shapes": Model(_tiny, _shapes, 128, "measured"),
    "sd35_medium": Model(_sd3, lambda: SD35_MEDIUM, 512, "counted"),
    "flux1_dev": Model(Workload, lambda: FLUX1_DEV, 512, "counted"),
}


def run(options: argparse.Namespace, unknown: list[str], command: list[str]) -> int:
    """Find every point, print the result. Exit code 2 for wrong settings.

    Args:
        options: of `python -m bench memory`.
        command: the arguments that give this result again.
    """
    try:
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}; see --help")
        lengths, plan = _settings(options)
    except ValueError as error:
        print(f"bench memory: error: {error}", file=sys.stderr)
        return 2
    model = MODELS[options.model or "shapes"]
    point: Point = allocated if options.gpu else measure if model.how == "measured" else count
    result = trajectory(plan, lengths, point, progress=_progress)
    how = {"how": model.how, "how_in_words": _HOW[model.how]}
    if options.gpu:
        how = {"how": "measured", "how_in_words": _HOW["on a GPU"], "device": torch.cuda.get_device_name()}
    result = {"model": options.model or "shapes", **how, **result}
    print(json.dumps(result, indent=1) if options.json else table(result))
    if options.output:
        path = record.write(options.output, ["memory", *command], result, seeds=[SEED])
        print(f"wrote {path.name}", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Axes:
    """The workloads: the first of each axis is that of the curves over length."""

    batch: Sequence[Workload]
    resolution: Sequence[Workload]
    blocks: Sequence[Workload]


def trajectory(axes: Axes, lengths: Sequence[int], point: Point, *, progress: Callable[[str], None]) -> dict[str, Any]:
    """All methods at all lengths, and along every axis that has more than one value.

    Returns:
        lengths; peak_bytes, host_bytes, ...: {method: a value for each length, None where it has none}; axes; growth.
    """
    base, point = axes.batch[0], _once(point, progress)
    found = _curves([replace(base, legs=length) for length in lengths], point)
    result: dict[str, Any] = {"settings": _described(base), "included": _INCLUDED, "lengths": list(lengths), **found}
    peaks = found["peak_bytes"]
    growth: dict[str, Any] = {
        "bytes_per_step": _lines(lengths, peaks),
        "spread_over_lengths": {
            method: spread([p for p in peaks[method] if p is not None]) for method in ENGINE if any(peaks[method])
        },
    }
    result["axes"] = {}
    for name, unit, position in (
        ("batch", "image", lambda w: w.batch),
        ("resolution", "token", _tokens),
        ("blocks", "block", _blocks),
    ):
        workloads: Sequence[Workload] = getattr(axes, name)
        if len(workloads) < 2:
            continue
        along = _curves([replace(workload, legs=AXIS_LENGTH) for workload in workloads], point)
        at = [position(workload) for workload in workloads]
        values = at if name != "resolution" else [workload.resolution for workload in workloads]
        result["axes"][name] = {"values": values, f"{unit}s": at, "length": AXIS_LENGTH, **along}
        growth[f"bytes_per_{unit}"] = _lines(at, along["peak_bytes"])
    return {**result, "growth": growth}


def _once(point: Point, progress: Callable[[str], None]) -> Point:
    """Every point is found once, and told: the axes meet."""
    known: list[tuple[Workload, str, Mapping[str, float]]] = []

    def remembered(workload: Workload, method: str) -> Mapping[str, float]:
        for one, of, found in known:
            if (one, of) == (workload, method):
                return found
        found = point(workload, method)
        known.append((workload, method, found))
        told = f"{found['peak_bytes'] / _MIB:.1f} MiB" if found else "out of memory"
        progress(f"{method}, {_spelled(workload)}: {told}")
        return found

    return remembered


def _curves(workloads: Sequence[Workload], point: Point) -> dict[str, Any]:
    found: dict[str, list[Mapping[str, float]]] = {method: [] for method in METHODS}
    for method in METHODS:
        for workload in workloads:
            values = point(workload, method) if exists(method, workload.legs) else {}
            found[method].append(values)
    names = {name for values in found.values() for value in values for name in value}
    return {
        name: {method: [value.get(name) for value in values] for method, values in found.items()}
        for name in _FIELDS
        if name in names or name == "peak_bytes"
    }


def _lines(x: Sequence[float], peaks: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    lines = {}
    for method, values in peaks.items():
        points = [(at, value) for at, value in zip(x, values, strict=True) if value is not None]
        line = fit([at for at, _ in points], [value for _, value in points])
        lines[method] = None if line is None else asdict(line)
    return lines


def table(result: Mapping[str, Any]) -> str:
    """The result as aligned text, in MiB."""
    lines = [f"{result['model']}, {result['how']}: peak MiB", ""]
    lines += _rows("differentiated steps", result["lengths"], result["peak_bytes"])
    for name, axis in result["axes"].items():
        lines += ["", *_rows(f"{name}, {axis['length']} steps", axis["values"], axis["peak_bytes"])]
    for name, laws in result["growth"].items():
        if not name.startswith("bytes_per_"):
            continue
        lines += ["", f"MiB per {name.removeprefix('bytes_per_')}"]
        for method, law in laws.items():
            if law is not None:
                sure = "" if law["r_squared"] is None else f"   R² {law['r_squared']:.6f}"
                lines.append(f"{method:26}{law['slope'] / _MIB:12.4f}{sure}")
    lines.append("")
    for method, value in result["growth"]["spread_over_lengths"].items():
        lines.append(f"{method}: largest peak {100 * value:.2f}% above the smallest")
    return "\n".join(lines)


def _rows(head: str, values: Sequence[Any], peaks: Mapping[str, Sequence[float | None]]) -> Iterator[str]:
    yield f"{head:26}" + "".join(f"{value!s:>12}" for value in values)
    for method, found in peaks.items():
        yield f"{method:26}" + "".join(f"{'-' if p is None else f'{p / _MIB:.1f}':>12}" for p in found)


def _settings(options: argparse.Namespace) -> tuple[list[int], Axes]:
    name = options.model or "shapes"
    model = MODELS[name]
    for other in ("simulate", "vram", "mode", "recompute", "model_config"):
        if getattr(options, other):
            raise ValueError(
                f"{other.replace('_', '-')} is not for --trajectory, which runs --model {name}: leave it out"
            )
    if options.gpu and not torch.cuda.is_available():
        raise ValueError(f"gpu: torch sees no CUDA GPU; without --gpu {name} is {model.how} on the CPU")
    lengths = numbers("trajectory", options.trajectory)
    if lengths != sorted(set(lengths)):
        raise ValueError(f"trajectory={options.trajectory}: give rising numbers of steps, e.g. 1,2,3,5,10,25")
    if lengths[-1] > options.steps:
        raise ValueError(f"trajectory={lengths[-1]} steps of a rollout of {options.steps}: raise --steps or shorten it")
    architectures = [with_blocks(model.architecture(), name, text) for text in options.blocks or [""]]
    resident = int(options.resident) if options.resident.isdecimal() else options.resident
    base = model.workload(
        architecture=architectures[0],
        batch=1,
        resolution=model.resolution,
        steps=options.steps,
        plan=MemoryPlan(microbatch=1 if options.microbatch is None else options.microbatch, resident=resident),
    )
    batches = [replace(base, batch=n) for n in numbers("batch", options.batch or "1")]
    base = batches[0]
    resolutions = numbers("resolution", options.resolution or str(model.resolution))
    base = replace(base, resolution=resolutions[0])
    return lengths, Axes(
        batch=[replace(base, batch=workload.batch) for workload in batches],
        resolution=[replace(base, resolution=n) for n in resolutions],
        blocks=[replace(base, architecture=architecture) for architecture in architectures],
    )


def plain(name: str, *, resolution: int, steps: int) -> Workload:
    """A rollout of one image of that model, with everything streamed by the engine."""
    model, plan = MODELS[name], MemoryPlan(microbatch=1, resident="none")
    return model.workload(architecture=model.architecture(), batch=1, resolution=resolution, steps=steps, plan=plan)


def numbers(name: str, text: str) -> list[int]:
    """Whole numbers of at least 1 in a list like 1,2,5.

    Raises:
        ValueError: something else.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"{name}={text}: give whole numbers of at least 1, e.g. 1,2,5")
    return [int(part) for part in parts]


def with_blocks(architecture: Mapping[str, Any], name: str, text: str) -> dict[str, Any]:
    """The architecture with so many blocks: "D,S" double and single ones for FLUX's kind, else a number. "": as it is.

    Raises:
        ValueError: of another form.
    """
    if not text:
        return dict(architecture)
    keys = [key for key in ("num_layers", "num_single_layers") if key in architecture]
    counts = text.split(",")
    if len(counts) != len(keys) or not all(part.isdecimal() and int(part) >= 1 for part in counts):
        form = "two numbers of at least 1, e.g. 19,38" if len(keys) == 2 else "a number of at least 1, e.g. 24"
        raise ValueError(f"blocks={text}: give {form} for {name}")
    changed = dict(architecture) | dict(zip(keys, map(int, counts), strict=True))
    if "dual_attention_layers" in architecture:
        dual = architecture["dual_attention_layers"]
        changed["dual_attention_layers"] = tuple(i for i in dual if i < changed["num_layers"])
    return changed


def _blocks(workload: Workload) -> int:
    architecture = workload.architecture
    return int(architecture["num_layers"]) + int(architecture.get("num_single_layers", 0))


def _tokens(workload: Workload) -> int:
    return int((workload.resolution // workload.patch) ** 2) + workload.text_tokens


def _described(workload: Workload) -> dict[str, Any]:
    return {
        "blocks": _blocks(workload),
        "batch": workload.batch,
        "resolution": workload.resolution,
        "tokens": _tokens(workload),
        "steps": workload.steps,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "engine": {
            "microbatch": workload.plan.microbatch,
            "resident": workload.plan.resident,
            "hoist": workload.plan.hoist,
        },
        "engine_paired": "keeps block inputs of all differentiated steps on the host",
        "engine_held": "computes every differentiated step again from its latents",
        "full_checkpointed": "a checkpoint a block, diffusers' enable_gradient_checkpointing",
        "full_step_checkpointed": "a checkpoint a block and one around every step",
        "leapalign_one_graph": "a checkpoint a block; two leaps whatever their length",
    }


def _spelled(workload: Workload) -> str:
    return f"{workload.legs} steps, batch {workload.batch}, {workload.resolution} pixels, {_blocks(workload)} blocks"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
