"""SD3Transformer2DModel in stages: diffusers' own modules, in the order of its forward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.attention import set_attention, set_processors
from leapalign.engine.backbones.fused import joint_block, modulated_output, runs_fused
from leapalign.engine.backbones.modulation import hoist_modulation
from leapalign.engine.backbones.stage import (
    Part,
    Stage,
    check_arguments,
    check_covered,
    diffusers_output,
    full_names,
    template,
)
from leapalign.engine.backbones.velocity import timestep_scale

_NEEDED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")


class SD3Backbone:
    """Stable Diffusion 3 and 3.5 (diffusers 0.37 and later): see `Backbone` for the fields.

    carried: (hidden_states (B, patches, D), encoder_hidden_states (B, text tokens, D)); the head gets the first.
    constants: (height, width) of the latents, two ints.

    Args:
        module: SD3Transformer2DModel; not modified.
        hoist: whether blocks and head take ready modulation vectors instead of temb.
        device: where the stages run.
        kernels, attention: see `backbone_of`.
    """

    condition_inputs: tuple[str, ...] = ("timestep", "pooled_projections")

    def __init__(
        self, module: nn.Module, *, hoist: bool, device: torch.device, kernels: str = "torch", attention: str = "auto"
    ) -> None:
        self.module, self.device = module, device
        self.timestep_scale: float | None = timestep_scale(module)
        shell: Any = template(module, device)
        names = full_names(shell)
        self.fused = runs_fused(kernels, shell, device)
        if self.fused or attention not in ("auto", "native"):  # SD3's own processor knows no backends
            set_processors(shell, fused=self.fused, text_first=False)
        set_attention(shell, attention, device)
        patch, channels = int(shell.config.patch_size), int(shell.out_channels)

        self.condition: Stage | None = Part(shell.time_text_embed, _condition, names).stage("condition")
        embedders = {"pos_embed": shell.pos_embed, "context_embedder": shell.context_embedder}
        self.stem = Part(embedders, _stem, names).stage("stem")
        count = len(shell.transformer_blocks)
        self.blocks = tuple(
            _block_stage(
                f"transformer_blocks.{index}", block, names, hoist=hoist, last=index + 1 == count, fused=self.fused
            )
            for index, block in enumerate(shell.transformer_blocks)
        )
        modulation = hoist_modulation(shell, ("norm_out",)) if hoist else ()

        def head(modules: Any, carried: tuple[Tensor, ...], condition: Tensor, size: tuple[int, int]) -> Tensor:
            norm = partial(modulated_output, modules["norm_out"]) if self.fused else modules["norm_out"]
            patches = modules["proj_out"](norm(carried[0], condition))
            return _unpatchify(patches, size, patch, channels)

        self.head = Part({"norm_out": shell.norm_out, "proj_out": shell.proj_out}, head, names).stage(
            "head", modulation
        )
        check_covered(self)

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return check_arguments(inputs, needed=_NEEDED, model=type(self.module).__name__)

    def constants(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        height, width = inputs["hidden_states"].shape[-2:]
        return int(height), int(width)

    def microbatch_constants(self, constants: Any, inputs: Mapping[str, Any]) -> Any:
        return constants

    def output(self, value: Tensor, return_dict: bool) -> Any:
        return diffusers_output(value, return_dict)


def _condition(embed: Any, inputs: Mapping[str, Any]) -> Tensor:
    temb: Tensor = embed(inputs["timestep"], inputs["pooled_projections"])
    return temb


def _stem(embedders: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    patches = embedders["pos_embed"](inputs["hidden_states"]).contiguous()
    return patches, embedders["context_embedder"](inputs["encoder_hidden_states"])


def _block_stage(
    name: str, block: nn.Module, names: Mapping[int, str], *, hoist: bool, last: bool, fused: bool
) -> Stage:
    modulation = hoist_modulation(block, ("norm1", "norm1_context")) if hoist else ()

    def compute(block: Any, carried: tuple[Tensor, ...], condition: Tensor, size: tuple[int, int]) -> Any:
        if fused:
            text, image = joint_block(block, carried[0], carried[1], condition)
        else:
            text, image = block(hidden_states=carried[0], encoder_hidden_states=carried[1], temb=condition)
        return (image,) if last else (image, text)

    return Part(block, compute, names).stage(name, tuple(f"{name}.{linear}" for linear in modulation))


def _unpatchify(patches: Tensor, size: tuple[int, int], patch: int, channels: int) -> Tensor:
    """(B, rows * columns, patch^2 * channels) -> (B, channels, height, width)."""
    rows, columns = size[0] // patch, size[1] // patch
    grid = patches.reshape(patches.shape[0], rows, columns, patch, patch, channels)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(patches.shape[0], channels, rows * patch, columns * patch)
