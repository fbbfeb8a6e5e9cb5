"""How much device memory does a step take? Runs the streamed engine on the real model's shapes with fake tensors.

No GPU and no memory is needed: `meta` plays the GPU, and every tensor on it is counted while it lives, as are all
FLOPs. See bench/memory/simulate.py for what runs, engine/planning/counting.py for what is counted.

With --trajectory: peak memory against the number of differentiated steps, beside plain autograd
(bench/memory/trajectory.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import record
from bench.memory import trajectory
from bench.memory.simulate import SEED, Simulated, Workload, simulate
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.workload import Budget
from leapalign.families.flux import FLUX1_DEV
from leapalign.families.sd3 import SD35_MEDIUM

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {"flux1_dev": FLUX1_DEV, "sd35_medium": SD35_MEDIUM}
_GIB = 2**30
_LISTED = 12  # rows of what is alive at the peak


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench memory`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--simulate", choices=ARCHITECTURES, help="one step of the engine; whose shapes")
    what.add_argument("--trajectory", metavar="LIST", help="numbers of differentiated steps, e.g. 1,2,3,5,10,25")
    parser.add_argument(
        "--model", choices=trajectory.MODELS, help="of --trajectory; shapes (the default) is measured, others counted"
    )
    parser.add_argument("--model-config", type=Path, help="a FLUX transformer's config.json, instead of the named one")
    parser.add_argument(
        "--blocks",
        nargs="+",
        help="D,S: only so many double and single blocks (N: for SD3); several are an axis of --trajectory",
    )
    parser.add_argument("--batch", help="images a step (default: 8; 1 for --trajectory, where a list is an axis)")
    parser.add_argument("--resolution", help="pixels a side (default: 512; 128 for shapes); a list is an axis, too")
    parser.add_argument("--steps", type=int, default=25, help="of the rollout (default: %(default)s)")
    parser.add_argument(
        "--resident", default="none", help="weights kept on the device: all, none or a number of blocks"
    )
    parser.add_argument("--vram", help="let the planner choose what is resident, and more, for so much, e.g. 24GiB")
    parser.add_argument("--mode", choices=("paired", "held"), help="how the two legs share a step (default: paired)")
    parser.add_argument("--recompute", action="store_true", help="the rollout keeps no block inputs")
    parser.add_argument("--microbatch", type=int, help="images in one block call (default: 1, or the planner's)")
    parser.add_argument("--gpu", action="store_true", help="measure the points of --trajectory on the GPU here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="NAME", help="also write bench/results/NAME.json")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Simulate and print. Exit code 2 for wrong settings."""
    if options.trajectory:
        return trajectory.run(options, unknown, _command(options))
    try:
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]}; see --help")
        if options.model:
            raise ValueError(f"model={options.model} is for --trajectory: leave it out with --simulate")
        if options.gpu:
            raise ValueError("gpu is for --trajectory: leave it out with --simulate, which needs none")
        workload = _workload(options)
    except (ValueError, OSError) as error:
        print(f"bench memory: error: {error}", file=sys.stderr)
        return 2
    planned = {"planned_peak_bytes": workload.planned().peak_device_bytes}
    result = {"settings": _settings(options, workload), **planned, **_as_dict(simulate(workload))}
    print(json.dumps(result, indent=1) if options.json else table(result))
    if options.output:
        path = record.write(options.output, ["memory", *_command(options)], result, seeds=[SEED])
        print(f"wrote {path.name}", file=sys.stderr)
    return 0


def table(result: Mapping[str, Any]) -> str:
    """The result as aligned text."""
    settings = result["settings"]
    lines = [", ".join(f"{name} {value}" for name, value in settings.items()), ""]
    lines.append(f"{'phase':20}{'device GiB':>12}{'forwards an image':>20}")
    for phase in result["phases"]:
        lines.append(f"{phase['name']:20}{phase['counted_bytes'] / _GIB:12.2f}{phase['forwards_per_image']:20.2f}")
    lines.append(f"{'step':20}{result['counted_peak_bytes'] / _GIB:12.2f}{result['forwards_per_image']:20.2f}")
    lines.append(f"{'planned':20}{result['planned_peak_bytes'] / _GIB:12.2f}")
    lines += ["", f"{'at the peak':>12}  number, shape, dtype and operator"]
    for held in result["at_peak"]:
        shape = "×".join(map(str, held["shape"])) or "1"
        lines.append(
            f"{held['counted_bytes'] / _GIB:12.3f}  {held['count']} × {shape} {held['dtype']}, {held['operator']}"
        )
    return "\n".join(lines)


def _workload(options: argparse.Namespace) -> Workload:
    architecture = dict(ARCHITECTURES[options.simulate])
    if options.model_config:
        architecture = _read_config(options.model_config, architecture)
    if options.blocks is not None:
        if "num_single_layers" not in architecture:
            raise ValueError(f"blocks={' '.join(options.blocks)} is for FLUX; leave it out for {options.simulate}")
        counts = options.blocks[0].split(",")
        if len(options.blocks) != 1 or len(counts) != 2 or not all(count.isdecimal() for count in counts):
            raise ValueError(f"blocks={' '.join(options.blocks)}: give two numbers, e.g. 19,38")
        architecture |= {"num_layers": int(counts[0]), "num_single_layers": int(counts[1])}
    resident = int(options.resident) if options.resident.isdecimal() else options.resident
    workload = Workload(
        architecture=architecture,
        batch=_one("batch", options.batch or "8"),
        resolution=_one("resolution", options.resolution or "512"),
        steps=options.steps,
        mode=options.mode or "paired",
        keep_block_inputs=not options.recompute,
        plan=MemoryPlan(microbatch=1 if options.microbatch is None else options.microbatch, resident=resident),
    )
    if options.vram is None:
        return workload
    return workload.within(Budget(vram=options.vram), microbatch=options.microbatch)


def _one(name: str, text: str) -> int:
    found = trajectory.numbers(name, text)
    if len(found) > 1:
        raise ValueError(f"{name}={text}: --simulate takes one number; a list is an axis of --trajectory")
    return found[0]


def _read_config(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture's arguments in a config.json that diffusers wrote."""
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model-config={path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get("_class_name", "FluxTransformer2DModel") != "FluxTransformer2DModel":
        raise ValueError(f"model-config={path} is not of a FluxTransformer2DModel: give its transformer/config.json")
    missing = sorted(known.keys() - config.keys() - {"axes_dims_rope"})
    if missing:
        raise ValueError(f"model-config={path} lacks {', '.join(missing)}: give the whole transformer/config.json")
    return {name: config[name] for name in known if name in config}


def _settings(options: argparse.Namespace, workload: Workload) -> dict[str, Any]:
    architecture = workload.architecture
    return {
        "simulate": options.model_config.name if options.model_config else options.simulate,
        "blocks": [architecture["num_layers"], architecture.get("num_single_layers", 0)],
        "batch": workload.batch,
        "resolution": workload.resolution,
        "steps": workload.steps,
        "resident": workload.plan.resident,
        "mode": workload.mode,
        "recompute": not workload.keep_block_inputs,
        "microbatch": workload.plan.microbatch,
        "hoist": workload.plan.hoist,
        "block_inputs": workload.plan.block_inputs,
        "every": workload.plan.every,
        **({"vram": options.vram} if options.vram else {}),
    }


def _as_dict(simulated: Simulated) -> dict[str, Any]:
    image = simulated.flops / simulated.forwards_per_image  # FLOPs of one forward of every image
    return {
        "counted_peak_bytes": simulated.counted_peak_bytes,
        "phases": [
            {"name": name, "counted_bytes": phase.counted_bytes, "forwards_per_image": phase.flops / image}
            for name, phase in simulated.phases.items()
        ],
        "forwards_per_image": simulated.forwards_per_image,
        "parameters": simulated.parameters,
        "forward_flops": simulated.forward_flops,
        "at_peak": [
            {
                "counted_bytes": held.counted_bytes,
                "count": held.count,
                "shape": list(held.shape),
                "dtype": held.dtype,
                "operator": held.operator,
            }
            for held in simulated.holdings[:_LISTED]
        ],
    }


def _command(options: argparse.Namespace) -> list[str]:
    """The arguments that give this result again."""
    command = []
    for name, value in vars(options).items():
        if name in ("what", "output") or value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command
