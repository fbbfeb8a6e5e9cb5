"""The sections of docs/benchmarks.md: which results they are about, how they are shown, and what measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.report import commands, figures, memory_tables, speed_tables, step_tables, training_tables
from bench.report.commands import Command
from bench.report.figures import Figure

Make = Callable[[Sequence[dict[str, Any]]], str]


@dataclass(frozen=True)
class Section:
    """One table or more.

    Attributes:
        name: of its block in README.md.
        about: what is measured, in a sentence or two.
        wanted: of a file's name without its ending, and its result: whether the section is about it.
        table: of all results that are wanted, at least one; empty if they say nothing.
        measured_by: the command.
        quoted: the shorter table for README.md, if there is one.
    """

    name: str
    title: str
    about: str
    wanted: Callable[[str, Mapping[str, Any]], bool]
    table: Make
    measured_by: Command
    figure: Figure | None = None
    quoted: Make | None = None


def _named(prefix: str) -> Callable[[str, Mapping[str, Any]], bool]:
    return lambda name, _: name.startswith(f"{prefix}-")


def _with(*keys: str) -> Callable[[str, Mapping[str, Any]], bool]:
    return lambda _, result: all(key in result for key in keys)


SECTIONS = (
    Section(
        "quality",
        "Quality of the embedded default",
        "`make align` on the packaged model, judged by a rule-based checker that training never sees.",
        _named("quality"),
        training_tables.quality,
        commands.QUALITY,
        quoted=partial(training_tables.quality, short=True),
    ),
    Section(
        "curves",
        "Reward curves",
        "Whole training runs with the 8-bit optimizer, and with fused blocks, beside float32.",
        _named("curves"),
        training_tables.curves,
        commands.CURVES,
        quoted=partial(training_tables.curves, short=True),
    ),
    Section(
        "optimizers",
        "Rounding",
        "The reward of one fixed batch, which shows the optimizer and not the batch.",
        _named("optimizers"),
        training_tables.optimizers,
        commands.OPTIMIZERS,
    ),
    Section(
        "tracking",
        "A thousand steps",
        "Flow matching on the packaged model's own scenes, with 8-bit AdamWs beside float32.",
        _named("tracking"),
        training_tables.tracking,
        commands.TRACKING,
    ),
    Section(
        "states",
        "Optimizer states",
        "What optimizers keep, found by making them and looking.",
        _with("optimizers", "parameters"),
        memory_tables.optimizer_states,
        commands.STATES,
        quoted=partial(memory_tables.optimizer_states, short=True),
    ),
    Section(
        "memory",
        "Memory of a step",
        "The streamed engine on the real model's shapes, every tensor on the device counted while it lives.",
        lambda name, result: "counted_peak_bytes" in result or "resolution" in result.get("axes", {}),
        memory_tables.simulated,
        commands.COUNTED[0],
        figure=figures.RESOLUTION,
        quoted=partial(memory_tables.simulated, short=True),
    ),
    Section(
        "trajectory",
        "Memory against trajectory length",
        "How many steps of the rollout are differentiated, and what that takes.",
        _with("lengths", "peak_bytes"),
        memory_tables.trajectory,
        commands.TRAJECTORY,
        figure=figures.TRAJECTORY,
        quoted=partial(memory_tables.trajectory, short=True),
    ),
    Section(
        "throughput",
        "Throughput",
        "Seconds of an optimizer step: streamed under a device cap, resident, and by the trainer that one would write "
        "with diffusers, checkpointing and an 8-bit optimizer.",
        _with("ways", "device"),
        step_tables.throughput,
        commands.THROUGHPUT,
        figure=figures.PHASES,
    ),
    Section(
        "kernels",
        "Kernels compiled",
        "What Triton's compiler makes of every kernel.",
        _with("kernels", "architectures"),
        speed_tables.kernels_compiled,
        commands.KERNELS,
        quoted=speed_tables.kernels_compiled_in_words,
    ),
    Section(
        "kernels-timed",
        "Kernels timed",
        "Every operation beside eager torch, torch.compile and other libraries, and a copy.",
        _with("operations", "device"),
        speed_tables.kernels_timed,
        commands.KERNELS_TIMED,
        figure=figures.ROOFLINE,
        quoted=speed_tables.kernels_timed_beside,
    ),
    Section(
        "host-optimizer",
        "Optimizer on the host",
        "Parameters a second of the C++ AdamW beside torch's and others', in one run.",
        _with("mparams_per_s", "gb_per_s"),
        speed_tables.host_optimizer,
        commands.HOST_OPTIMIZER,
        figure=figures.HOST,
        quoted=speed_tables.host_optimizer_in_words,
    ),
    Section(
        "gpu",
        "A run on a GPU",
        "The stages of `bench gpu`: correctness on the device, ceilings, real-sized steps under device caps.",
        _with("stages"),
        step_tables.gpu,
        commands.RUN,
        quoted=partial(step_tables.gpu, short=True),
    ),
    Section(
        "doctor",
        "Machines",
        "What `leapalign doctor` measures, and which presets fit.",
        _with("rates", "presets"),
        step_tables.doctor,
        commands.DOCTOR,
    ),
)
