"""The optimizer on the host: parameters a second, beside other AdamWs and what memory gives, in one run.

Everything runs in turn, round after round, with the same number of threads, and is compared by medians over the rounds:
what else the machine does hits all alike. Beside the seconds stands the processor time that was really obtained.

    adamw8bit, avx512 ...   bfloat16 weights, stochastic rounding, bfloat16 gradients: kernels/adamw8bit/host.py
    torch fused             torch.optim.AdamW(fused=True), whose moments have the weights' dtype
    bitsandbytes, torchao   their 8-bit AdamW on float32 weights, where they run on a CPU
    copy, in-place mix      bytes read and written by a plain copy; and by loops that compute next to nothing over the
                            update's own traffic, weights and codes in place and a gradient that is read

A copy hides that memory is read before it is written. What is slow is measured on fewer parameters.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from bench import record
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper, update
from leapalign.kernels.adamw8bit.quantize import BLOCK
from leapalign.kernels.host import native as host

Run = Callable[[], object]
_BYTES = 2 + 2 + 2 * (1 + 4 / BLOCK), 2 + 2 * (1 + 4 / BLOCK)  # read and written a parameter, bf16 gradient
_BYTES_FUSED = {torch.float32: 28, torch.bfloat16: 14}  # weights, two moments both ways, gradient
SEED = 1  # of weights and gradients
_SMALL = 2**24  # parameters of what is too slow for more, 100 MB and above: far from fitting the caches
_REFERENCE = 2**20  # and of the torch reference, whose own temporaries do fit


@dataclass(frozen=True)
class Contender:
    """One way to update parameters, or to move bytes.

    Attributes:
        run: one step.
        count: parameters, or bytes, that it handles.
        bytes_a_parameter: read and written; None for what is counted in bytes.
    """

    run: Run
    count: int
    bytes_a_parameter: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench host-optimizer`."""
    parser.add_argument("--parameters", type=int, default=64 * 2**20, help="of the largest runs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of all in turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of every contender (default: torch's number)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="NAME", help="also write bench/results/NAME.json")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Measure and print. Exit code 2 for wrong settings."""
    problems = {
        f"unknown argument {unknown[0]}; see --help" if unknown else "": bool(unknown),
        f"parameters={options.parameters} must be at least {BLOCK}": options.parameters < BLOCK,
        f"rounds={options.rounds} must be at least 2: medians and their spread are taken": options.rounds < 2,
        f"threads={options.threads} must be at least 1": options.threads is not None and options.threads < 1,
    }
    for problem, holds in problems.items():
        if holds:
            print(f"bench host-optimizer: error: {problem}", file=sys.stderr)
            return 2
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        results = measure(options.parameters, options.rounds)
    finally:
        torch.set_num_threads(before)
    settings = {"parameters": options.parameters, "rounds": options.rounds}
    results = {"settings": settings, **results}
    if options.output:
        command = ["host-optimizer", "--parameters", str(options.parameters), "--rounds", str(options.rounds)]
        command += ["--threads", str(options.threads)] if options.threads else []
        record.write(options.output, [*command, "--json"], results, seeds=[SEED])
    print(json.dumps(results, indent=1) if options.json else table(results))
    return 0


def measure(parameters: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds: see the module. Threads are torch's number."""
    parameters = -(-parameters // BLOCK) * BLOCK
    contenders, left_out = _contenders(parameters)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cores: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run()  # states are made, pages are there
    for number in range(rounds):
        for name, contender in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            contender.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            seconds[name].append(wall)
            cores[name].append(cpu / wall)
        print(f"round {number + 1} of {rounds}", file=sys.stderr, end="\r", flush=True)
    print(file=sys.stderr)
    rates = {name: each.count / median(seconds[name]) for name, each in contenders.items()}
    updates = {name: each for name, each in contenders.items() if each.bytes_a_parameter is not None}
    gigabytes = {name: rates[name] * (each.bytes_a_parameter or 1) / 1e9 for name, each in contenders.items()}
    fused, mix = rates["torch_fused_fp32"], gigabytes["in_place_mix"]
    return {
        "mparams_per_s": {name: rates[name] / 1e6 for name in updates} | dict.fromkeys(left_out),
        "gb_per_s": gigabytes,
        "of_torch_fused_fp32": {name: rates[name] / fused for name in updates},
        "of_in_place_mix": {name: gigabytes[name] / mix for name in updates},
        "spread": {name: _spread(values) for name, values in seconds.items()},
        "cores_obtained": {name: median(values) for name, values in cores.items()},
        "threads": torch.get_num_threads(),
        "left_out": left_out,
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as aligned text."""
    lines = [f"{results['threads']} threads; medians of {results['settings']['rounds']} rounds, all in turn", ""]
    lines.append(f"{'':24}{'Mparam/s':>10}{'GB/s':>8}{'of torch fused':>16}{'of the mix':>12}{'spread':>8}{'cores':>8}")
    for name, rate in results["gb_per_s"].items():
        count = results["mparams_per_s"].get(name)
        cells = ["", "", ""]
        if count is not None:
            of_torch, of_mix = results["of_torch_fused_fp32"][name], results["of_in_place_mix"][name]
            cells = [f"{count:.0f}", f"{of_torch:.2f}", f"{of_mix:.2f}"]
        lines.append(
            f"{name:24}{cells[0]:>10}{rate:8.1f}{cells[1]:>16}{cells[2]:>12}"
            f"{results['spread'][name]:8.0%}{results['cores_obtained'][name]:8.2f}"
        )
    lines += [f"{name:24}{reason}" for name, reason in results["left_out"].items()]
    return "\n".join(lines)


def _spread(values: list[float]) -> float:
    """The middle half of the values, relative to the median."""
    low, _, high = quantiles(values, n=4)
    return (high - low) / median(values)


# ---- contenders ----------------------------------------------------------------------------------------------------


def _contenders(parameters: int) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that run here, and why others do not."""
    found: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    read, written = _BYTES
    for isa in reversed(host.instruction_sets()):
        count = parameters if isa != "scalar" else min(parameters, _SMALL)
        found[isa] = Contender(_ours(count, isa), count, read + written)
    if not host.instruction_sets():
        left_out["adamw8bit"] = f"the native module is missing: {host.missing}"
    small, few = min(parameters, _SMALL), min(parameters, _REFERENCE)
    found["torch_reference"] = Contender(_reference(few), few, read + written)
    for name, dtype in (("torch_fused_fp32", torch.float32), ("torch_fused_bf16", torch.bfloat16)):
        found[name] = Contender(
            _stepped(torch.optim.AdamW, parameters, dtype, fused=True), parameters, _BYTES_FUSED[dtype]
        )
    for name, module in (("bnb_adamw8bit", "bitsandbytes.optim"), ("torchao_adamw8bit", "torchao.optim")):
        try:
            run = _stepped(importlib.import_module(module).AdamW8bit, small, torch.float32)
            run()
        except Exception as error:  # whatever a library of another version does
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            found[name] = Contender(run, small, 4 + 4 + 2 + 4 + 2)  # float32 weights and gradient, two codes
    found["copy"] = _copy(parameters)
    found["in_place_mix"] = _in_place_mix(parameters)
    return found, left_out


def _gradient(count: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(SEED)).mul_(1e-3).to(dtype)


def _ours(count: int, isa: str) -> Run:
    weights, gradient, states = torch.randn(count).bfloat16(), _gradient(count, torch.bfloat16), _states(count)
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        hp = Hyper(1e-5, 0.9, 0.999, 1e-8, 1e-4, step)
        with host.instruction_set(isa):
            # guard: the engine has the norm of the gradient, and with it whether it is finite
            host_adamw8bit.update(weights, gradient, *states, hp, seed=0, parameter=0, guard=0.0).wait()

    return run


def _reference(count: int) -> Run:
    weights, gradient, states = torch.randn(count).bfloat16(), _gradient(count, torch.bfloat16), _states(count)
    hp = Hyper(1e-5, 0.9, 0.999, 1e-8, 1e-4, 1)
    return lambda: update(weights, gradient, *states, hp, seed=0, parameter=0)


def _states(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, scales = torch.zeros(count, dtype=torch.uint8), torch.zeros(-(-count // BLOCK))
    return codes, scales, codes.clone(), scales.clone()


def _stepped(kind: Any, count: int, dtype: torch.dtype, **options: Any) -> Run:
    """A step of a torch optimizer over one parameter."""
    parameter = torch.nn.Parameter(torch.randn(count).to(dtype))
    parameter.grad = _gradient(count, dtype)
    step: Run = kind([parameter], lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4, **options).step
    return step


def _copy(parameters: int) -> Contender:
    to, source = torch.empty(parameters), torch.ones(parameters)
    return Contender(lambda: host.copy(to, source).wait(), to.nbytes + source.nbytes, None)


def _in_place_mix(parameters: int) -> Contender:
    """Reads and writes of the 8-bit update: two codes and a weight in place, 4 bytes, and a gradient's 2 bytes read."""
    half = parameters // 2
    states, gradient = torch.ones(parameters), torch.zeros(half)  # as float32, which every loop is vectorised for

    def run() -> None:
        states[:half].add_(gradient)
        states[half:].mul_(1.0)

    return Contender(run, 2 * states.nbytes + gradient.nbytes, None)
