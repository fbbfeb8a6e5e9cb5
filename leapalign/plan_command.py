"""`leapalign plan`: what a run would take of a machine's memory and time, from the shapes of its models alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leapalign.architectures import CLIPS, TRANSFORMERS, VAE
from leapalign.engine.counting import Counting, DeviceCounter, gpu_operators
from leapalign.engine.plan import MemoryPlan, PhaseCost
from leapalign.engine.planner import BudgetError, Planner
from leapalign.engine.sizes import spell_bytes
from leapalign.engine.workload import Budget, Machine, RewardLoad, Workload
from leapalign.errors import UsageError

if TYPE_CHECKING:
    from leapalign.keys import AlignConfig

GIB = 2**30
CLIP_TOKENS = 77  # that Stable Diffusion 3's prompts have beside T5's


def plan_command(config: AlignConfig, budget: Budget, machine: Machine | None = None) -> dict[str, Any]:
    """The plan for a config, as printed by `leapalign plan --json`, and its "table".

    Args:
        budget: None in it: no limit.
        machine: rates; None for the defaults.

    Raises:
        UsageError: the model's shapes are not known, or the budget cannot hold the step.
    """
    machine = machine or Machine()
    planner = Planner(transformer_config(config), workload_of(config), machine)
    try:
        plan = planner.plan(budget)
    except BudgetError as error:
        raise UsageError(str(error).replace("lower the batch", "lower train_batch_size")) from None
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
    return {"settings": settings, **plan.as_dict(), "machine": vars(machine), "table": table(plan, settings)}


def workload_of(config: AlignConfig) -> Workload:
    """One optimizer step of this config under the streamed executor.

    What the config leaves to its defaults (microbatch, streamed_mode, optimizer_device) is the planner's to choose.
    """
    chosen = config.model_fields_set
    transformer, vae = transformer_config(config), vae_config(config)
    text_tokens = config.max_sequence_length
    if transformer.get("_class_name") == "SD3Transformer2DModel":
        text_tokens += CLIP_TOKENS
    workload = Workload(
        batch=config.train_batch_size,
        resolution=config.resolution,
        patch=2 ** len(vae["block_out_channels"]),
        text_tokens=text_tokens,
        num_inference_steps=config.num_inference_steps,
        nested=config.alpha > 0,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        microbatch=config.microbatch,
        mode=config.streamed_mode if "streamed_mode" in chosen else None,
        optimizer_on=config.optimizer_device if "optimizer_device" in chosen else None,
        dtype=torch.bfloat16 if config.weight_dtype == "bf16" else torch.float32,
        optimizer=config.optimizer,
        clip=config.clip,
        master=config.master,
        ema=config.use_ema,
    )
    return replace(workload, rewards=reward_loads(config, vae))


def transformer_config(config: AlignConfig) -> Mapping[str, Any]:
    """transformer/config.json of the pipeline: from its folder, or known for its name.

    Raises:
        UsageError: neither.
    """
    name = config.pretrained_model_name_or_path
    return TRANSFORMERS[name] if name in TRANSFORMERS else _read(config, "transformer")


def vae_config(config: AlignConfig) -> Mapping[str, Any]:
    """vae/config.json of the pipeline, in the same way."""
    return VAE if config.pretrained_model_name_or_path in TRANSFORMERS else _read(config, "vae")


def reward_loads(config: AlignConfig, vae: Mapping[str, Any]) -> tuple[RewardLoad, ...]:
    """The VAE and the reward model, in float32, for one picture: as they are, and with the VAE's blocks recomputed.

    The packaged shapes reward is a hundredth of its VAE and not counted.
    """
    shapes = json.dumps(dict(vae))
    return tuple(_reward_load(config.reward, config.resolution, shapes, checkpointed) for checkpointed in (False, True))


@functools.cache
def _reward_load(reward: str, resolution: int, shapes: str, checkpointed: bool) -> RewardLoad:
    """`shapes` is the VAE's config.json."""
    from diffusers import AutoencoderKL

    vae = json.loads(shapes)

    counter = DeviceCounter()
    with torch.device("meta"), gpu_operators():
        decoder = AutoencoderKL.from_config(vae).eval().requires_grad_(False)
        if checkpointed:
            decoder.enable_gradient_checkpointing()
        side = resolution // 2 ** (len(vae["block_out_channels"]) - 1)
        latents = torch.empty(1, vae["latent_channels"], side, side, requires_grad=True)
        models: list[nn.Module] = [decoder]
        parameters = _parameters(decoder)
        vision = None
        if reward in CLIPS:
            vision = _vision(CLIPS[reward].vision)
            models.append(vision)
            parameters += CLIPS[reward].parameters
        held = [value for model in models for value in (*model.parameters(), *model.buffers())]
        with Counting(counter):
            counter.hold([*held, latents], None)
            before = counter.current
            pictures = (decoder.decode(latents, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)
            scores = pictures.flatten(1).mean(1) if vision is None else _score(vision, pictures)
            torch.autograd.grad(scores.sum(), latents)
    return RewardLoad(4 * parameters, counter.peak - before, counter.flops, checkpointed)


def _vision(sizes: Mapping[str, int]) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model: nn.Module = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).eval().requires_grad_(False)
    return model


def _score(vision: Any, pictures: Tensor) -> Tensor:
    from leapalign.rewards.clip import preprocess

    found: Tensor = vision(pixel_values=preprocess(pictures, vision.config.image_size)).image_embeds
    return found.sum(1)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _read(config: AlignConfig, part: str) -> Mapping[str, Any]:
    from leapalign.pipeline import resolve_model

    name = config.pretrained_model_name_or_path
    folder = resolve_model(name)
    path = Path(folder) / part / "config.json"
    if not path.is_file():
        raise UsageError(
            f"pretrained_model_name_or_path = '{name}': its shapes are not known ({', '.join(TRANSFORMERS)} are); "
            f"name a local pipeline folder with {part}/config.json"
        )
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def table(plan: MemoryPlan, settings: Mapping[str, Any]) -> str:
    """The plan as aligned text."""
    lines = [
        f"{settings['model']}, {settings['parameters'] / 1e9:.2f} billion parameters in {settings['weight_dtype']}, "
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


def _decisions(plan: MemoryPlan) -> dict[str, Any]:
    inputs = f"on the {plan.block_inputs}, every {plan.every}" if plan.every > 1 else f"on the {plan.block_inputs}"
    reward = "beside the weights" if plan.reward_residency == "on" else "resident weights off the device"
    return {
        "mode": plan.mode,
        "microbatch": plan.microbatch,
        "resident blocks": plan.resident,
        "slots": plan.slots,
        "block inputs": inputs + (" (kept from the rollout)" if plan.keep_block_inputs else " (computed again)"),
        "optimizer": f"on the {plan.optimizer_on}",
        "reward": reward + (", VAE recomputed in backward" if plan.checkpoint_reward else ""),
    }


def _row(phase: PhaseCost) -> str:
    return (
        f"{phase.name:20}{phase.device_bytes / GIB:12.2f}{phase.host_bytes / GIB:12.2f}{phase.h2d_bytes / 1e9:10.1f}"
        f"{phase.d2h_bytes / 1e9:10.1f}{phase.flops / 1e12:10.0f}{phase.seconds:10.1f}"
    )
