"""A config's pipeline and prompt embeddings, loaded as its plan and the memory that is free say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from leapalign.data.embeddings import EmbeddingStore, embed_prompts
from leapalign.engine.backbones.attention import check_attention
from leapalign.engine.plan import MemoryPlan
from leapalign.errors import UsageError
from leapalign.families.pipeline import FlowPipeline, load_pipeline
from leapalign.families.source import resolve_device, resolve_model
from leapalign.kernels.dispatch import allow
from leapalign.planning.workload import plan_run, run_budget, sampling_workload
from leapalign.rewards.loading import load_reward
from leapalign.rewards.protocol import RewardModel

if TYPE_CHECKING:
    from leapalign.config.keys import AlignConfig


def configured_pipeline(
    config: AlignConfig,
    transformer: str | Path | None = None,
    *,
    plan: MemoryPlan | None = None,
    scored: bool = True,
) -> FlowPipeline:
    """`load_pipeline` as the run's config says: model, device, precision and executor.

    Args:
        transformer: a transformer folder to take instead of the pipeline's own.
        plan: of a streamed run; None plans for drawing pictures alone, and for a reward to score them if `scored`.

    Raises:
        UsageError: as `load_pipeline`, or memory in which no plan fits.
    """
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if config.weight_dtype == "bf16" else torch.float32
    try:
        check_attention(config.attention, device, torch.bfloat16 if config.mixed_precision == "bf16" else dtype)
    except ValueError as error:
        raise UsageError(str(error)) from None
    allow(config.kernels != "torch")
    if config.executor == "streamed" and plan is None:
        plan = plan_run(config, device, workload=sampling_workload(config, device, scored=scored))
    return load_pipeline(
        config.pretrained_model_name_or_path,
        device=device,
        transformer=transformer,
        mixed_precision=config.mixed_precision,
        plan=plan,
        weight_dtype=dtype,
        attention=config.attention,
    )


def prompt_store(config: AlignConfig, prompts: Sequence[str]) -> EmbeddingStore:
    """The embeddings of `prompts` under the config's pipeline, cache, device and precision."""
    device = resolve_device(config.device)
    return embed_prompts(
        resolve_model(config.pretrained_model_name_or_path),
        prompts,
        max_sequence_length=config.max_sequence_length,
        cache_dir=config.cache_dir,
        device=device,
        device_bytes=run_budget(config, device)[0].device_bytes,
        dtype=embedding_dtype(config),
    )


def embedding_dtype(config: AlignConfig) -> torch.dtype:
    """The text encoders' dtype: bfloat16 where the transformer also computes in it."""
    return torch.bfloat16 if "bf16" in (config.mixed_precision, config.weight_dtype) else torch.float32


def configured_reward(config: AlignConfig) -> RewardModel:
    """The reward that the config names, on the run's device; of a streamed run on the CPU, from where it visits.

    Raises:
        UsageError: its files are not there.
    """
    device = resolve_device(config.device if config.executor == "autograd" else "cpu")
    return load_reward(config.reward, config.reward_model_name_or_path, device)
