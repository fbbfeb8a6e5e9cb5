"""The memory of a run: the plan it obeys from its first step to its last, and what to change when memory runs out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from leapalign.config.keys import AlignConfig
from leapalign.engine.memory.checkpoint import write_atomically
from leapalign.engine.memory.sizes import spell_bytes
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.planner import fits
from leapalign.engine.planning.workload import DEVICE_BASE, Budget
from leapalign.errors import UsageError
from leapalign.kernels.dispatch import reaches_device
from leapalign.planning.workload import plan_run, run_budget, workload_of

PLAN_FILE = "plan.json"
# decisions that change the order of sums, and so the last bits
ROUNDING = ("mode", "microbatch", "reward_microbatch", "keep_block_inputs", "kernels", "attention")
LESS = 0.9  # of what was planned: the budget to go on with after memory ran out


@dataclass(frozen=True)
class RunPlan:
    """What a run takes of the machine.

    Attributes:
        workload: text of what was planned for and on what kind of device; a plan holds for that only.
        notes: lines to be told at the start.
    """

    plan: MemoryPlan
    budget: Budget
    workload: str
    notes: list[str] = field(default_factory=list)

    def save(self, output_dir: Path) -> None:
        """Write plan.json: decisions and predictions, phase by phase."""
        found = {"workload": self.workload, "vram": self.budget.vram, "ram": self.budget.ram, **self.plan.as_dict()}
        write_atomically(output_dir / PLAN_FILE, json.dumps(found, indent=1) + "\n")


def plan_of_run(config: AlignConfig, device: torch.device, start: Path | None, *, own_reward: bool = False) -> RunPlan:
    """The plan of the run that goes on here, if it still fits, else a new one.

    A run keeps its plan when it is resumed, though another amount of memory may be free then: microbatch and mode
    decide the order of sums, and so the last bits.

    Args:
        start: the checkpoint to go on from.
        own_reward: another reward than the config's is used, whose memory is not known.

    Raises:
        UsageError: the step does not fit into the memory that the config gives or the machine has.
    """
    budget, notes = run_budget(config, device)
    if device.type == "cuda":
        _cap(device, budget.device_bytes if config.vram is not None else math.inf)
    wanted = workload_of(config, device, own_reward=own_reward)
    workload = f"{device.type}: {wanted}"
    before = _read((start.parent if start else Path(config.output_dir)) / PLAN_FILE)
    if before and before.workload == workload and fits(before.plan, run_budget(config, device, slack=0)[0]):
        plan = before.plan
    else:
        plan = plan_run(config, device, workload=wanted)
        if before and start and (changes := _changes(before.plan, plan)):
            notes.append(f"another plan than before ({changes}): the run goes on with the same values up to rounding")
    if plan.kernels == "triton" and not reaches_device(device):
        notes.append(f"kernels = triton: Triton does not compute on {device}; its operators' references in torch run")
    if own_reward:
        notes.append("the memory of a reward of your own is not in the plan: leave room for it with vram")
    return RunPlan(plan, budget, workload, [*notes, _in_words(plan, budget)])


def memory_error(error: BaseException, config: AlignConfig, planned: RunPlan | None) -> UsageError | None:
    """What to change when memory has run out; None for any other error."""
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        if planned is None:
            return UsageError(
                f"out of device memory with executor = {config.executor}, microbatch = {config.microbatch}: {reason}; "
                "use --executor streamed, or lower --microbatch, or set --gradient_checkpointing"
            )
        peak = planned.plan.peak_device_bytes
        begun = (Path(config.output_dir) / "config.yaml").is_file()
        return UsageError(
            f"out of device memory, of which {spell_bytes(peak)} were planned: {reason}; give --vram "
            f"{spell_bytes(int(LESS * peak))} for a smaller plan" + (" and --resume_from_checkpoint latest" * begun)
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in reason:
        share = f", of which {spell_bytes(planned.plan.peak_host_bytes)} were planned" if planned else ""
        ways = " or ".join(
            [*_savings(config), "--train_batch_size 1" if config.train_batch_size > 1 else "more memory"]
        )
        return UsageError(f"out of host memory{share}: {reason}; less is taken with {ways}")
    if reason.startswith("cannot lock"):
        return UsageError(reason.replace(", or pass pin=False for slower copies", ""))
    return None


def _savings(config: AlignConfig) -> list[str]:
    """Settings that take host memory away from a run of this config."""
    ways = []
    if config.executor == "streamed" and config.optimizer == "adamw":
        ways.append("--optimizer adamw8bit --weight_dtype bf16 (a new run)")
    if config.use_ema:
        ways.append("--use_ema false")
    if config.optimizer == "adamw8bit" and config.clip == "global" and config.gradient_accumulation_steps == 1:
        ways.append("--clip block")
    return ways


def _cap(device: torch.device, limit: float) -> None:
    """Let torch's allocator give up memory it no longer uses, or fail, rather than take more than the limit."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(limit - DEVICE_BASE, 0) / total), device)


def _read(path: Path) -> RunPlan | None:
    """The plan that a run wrote; None if there is none that this version can read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        workload, budget = found.pop("workload"), Budget(found.pop("vram"), found.pop("ram"))
        return RunPlan(MemoryPlan.from_dict(found), budget, workload)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changes(before: MemoryPlan, now: MemoryPlan) -> str:
    pairs = [(name, getattr(before, name), getattr(now, name)) for name in ROUNDING]
    return ", ".join(f"{name} {was} -> {new}" for name, was, new in pairs if was != new)


def _in_words(plan: MemoryPlan, budget: Budget) -> str:
    def part(peak: int, limit: object) -> str:
        return spell_bytes(peak) + (f" of {spell_bytes(int(str(limit)))}" if limit else "")

    blocks = {"all": "all", "none": "no"}.get(str(plan.resident), str(plan.resident))
    return (
        f"plan: {plan.mode}, microbatch {plan.microbatch}, {blocks} blocks resident, block inputs on the "
        f"{plan.block_inputs}, optimizer on the {plan.optimizer_on}; device "
        f"{part(plan.peak_device_bytes, budget.vram)}, host {part(plan.peak_host_bytes, budget.ram)} ({PLAN_FILE})"
    )
