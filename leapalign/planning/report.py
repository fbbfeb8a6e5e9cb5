"""`leapalign plan`: what a run would take of a machine's memory and time, from the shapes of its models alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from leapalign.engine.memory.sizes import spell_bytes
from leapalign.engine.plan import MemoryPlan, PhaseCost
from leapalign.engine.planning.planner import BudgetError
from leapalign.engine.planning.workload import Budget, Machine
from leapalign.planning.workload import planner_of, refusal, workload_of

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig

GIB = 2**30


def plan_command(config: AlignConfig, machine: Machine | None = None) -> dict[str, Any]:
    """The plan for a config, as printed by `leapalign plan --json`, and its "table".

    Its vram and ram are the limits, not the memory of this machine; null: no limit.

    Args:
        machine: rates; None for the defaults.

    Raises:
        UsageError: the executor plans nothing, the models' shapes are not known, or the budget cannot hold the step.
    """
    machine, budget = machine or Machine(), Budget(config.vram, config.ram)
    planner = planner_of(config, workload_of(config), machine)
    try:
        plan = planner.plan(budget)
    except BudgetError as error:
        raise refusal(error, config) from None
    workload = planner.workload
    parameters = sum(parameter.numel() for parameter in planner.costs.backbone.module.parameters())
    budgets = {"vram": budget.vram, "ram": budget.ram}
    settings = {
        "model": config.pretrained_model_name_or_path,
        "parameters": parameters,
        "resolution": workload.resolution,
        "train_batch_size": workload.batch,
        "gradient_accumulation_steps": workload.gradient_accumulation_steps,
        "optimizer": workload.optimizer,
        "weight_dtype": str(workload.dtype).removeprefix("torch."),
        **budgets,
    }
    return {
        "settings": settings,
        **plan.as_dict(),
        "machine": vars(machine),
        "default_rates": machine.defaults(),
        "table": f"{table(plan, settings)}\n\n{_rates(machine)}",
    }


def table(plan: MemoryPlan, settings: Mapping[str, Any]) -> str:
    """The plan as aligned text."""
    count = settings["parameters"]
    size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
    lines = [
        f"{settings['model']}, {size} parameters in {settings['weight_dtype']}, "
        f"{settings['optimizer']}; {settings['train_batch_size']} pictures of {settings['resolution']} pixels"
        + (f" x {n} passes" if (n := settings["gradient_accumulation_steps"]) > 1 else ""),
        "",
        *(f"  {name:18}{value}" for name, value in _decisions(plan).items()),
        "",
        f"{'phase':20}{'device GiB':>12}{'host GiB':>12}{'in GB':>10}{'out GB':>10}{'TFLOP':>10}{'seconds':>10}",
        *(_row(phase) for phase in plan.phases),
        f"{'step':20}{plan.peak_device_bytes / GIB:12.2f}{plan.peak_host_bytes / GIB:12.2f}{'':30}{plan.seconds:10.1f}",
    ]
    for place, peak in (("device", plan.peak_device_bytes), ("host", plan.peak_host_bytes)):
        limit = settings["vram" if place == "device" else "ram"]
        lines += ["", f"{place}: {spell_bytes(peak)}" + (f" of {spell_bytes(limit)}" if limit else "")]
        fullest = max(plan.phases, key=lambda phase: getattr(phase, f"{place}_bytes"))
        parts = {k.partition(": ")[2]: v for k, v in fullest.breakdown.items() if k.startswith(place)}
        lines += [f"  {count / GIB:8.2f}  {what}" for what, count in sorted(parts.items(), key=lambda part: -part[1])]
    return "\n".join(lines)


def _rates(machine: Machine) -> str:
    """What the seconds are predicted with."""
    default = machine.defaults()
    if len(default) == len(vars(machine)):
        return (
            "seconds: for an RTX 4090 on PCIe 4.0 x16; for your machine: leapalign doctor --output machine.json, "
            "then --machine machine.json"
        )
    given = [name for name in vars(machine) if name not in default]
    return f"seconds: with the given {', '.join(given)}" + (f"; by default {', '.join(default)}" if default else "")


def _decisions(plan: MemoryPlan) -> dict[str, Any]:
    inputs = f"on the {plan.block_inputs}, every {plan.every}" if plan.every > 1 else f"on the {plan.block_inputs}"
    reward = f"{plan.reward_microbatch} at once, "
    reward += "beside the weights" if plan.reward_residency == "on" else "resident weights off the device"
    return {
        "mode": plan.mode,
        "microbatch": plan.microbatch,
        "resident blocks": plan.resident,
        "slots": plan.slots,
        "block inputs": inputs + (" (kept from the rollout)" if plan.keep_block_inputs else " (computed again)"),
        "optimizer": f"on the {plan.optimizer_on}",
        "reward": reward + (", VAE recomputed in backward" if plan.checkpoint_reward else ""),
        "kernels": f"{plan.kernels}, attention {plan.attention}",
    }


def _row(phase: PhaseCost) -> str:
    return (
        f"{phase.name:20}{phase.device_bytes / GIB:12.2f}{phase.host_bytes / GIB:12.2f}{phase.h2d_bytes / 1e9:10.1f}"
        f"{phase.d2h_bytes / 1e9:10.1f}{phase.flops / 1e12:10.0f}{phase.seconds:10.1f}"
    )
