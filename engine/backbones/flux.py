"""FluxTransformer2DModel in stages: diffusers' own modules, in the order of its forward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.attention import set_attention, set_processors
from leapalign.engine.backbones.fused import joint_block, modulated_output, runs_fused, single_block
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

_NEEDED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")


class FluxBackbone:
    """FLUX.1 (diffusers 0.37 and later): see `Backbone` for the fields.

    carried: (hidden_states (B, image tokens, D), encoder_hidden_states (B, text tokens, D)); the head gets the first.
    constants: rope (cos, sin), each (text + image tokens, head dim) float32.

    Args:
        module: FluxTransformer2DModel; not modified.
        hoist: whether blocks and head take ready modulation vectors instead of temb.
        device: where the stages run.
        kernels, attention: see `backbone_of`.
    """

    def __init__(
        self, module: nn.Module, *, hoist: bool, device: torch.device, kernels: str = "torch", attention: str = "auto"
    ) -> None:
        self.module, self.device = module, device
        self.timestep_scale: float | None = timestep_scale(module)
        shell: Any = template(module, device)
        names = full_names(shell)
        self.fused = runs_fused(kernels, shell, device)
        if self.fused:
            set_processors(shell, fused=True, text_first=True)
        set_attention(shell, attention, device)
        self._pos_embed = shell.pos_embed
        self._last_rope: _LastRope | None = None
        self._guidance = hasattr(shell.time_text_embed, "guidance_embedder")
        guidance = ("guidance",) if self._guidance else ()
        self._needed = (*_NEEDED, *guidance)
        self.condition_inputs = ("timestep", *guidance, "pooled_projections")

        self.condition: Stage | None = Part(shell.time_text_embed, _condition, names).stage("condition")
        embedders = {"x_embedder": shell.x_embedder, "context_embedder": shell.context_embedder}
        self.stem = Part(embedders, _stem, names).stage("stem")
        blocks = [(f"transformer_blocks.{i}", block) for i, block in enumerate(shell.transformer_blocks)]
        blocks += [(f"single_transformer_blocks.{i}", block) for i, block in enumerate(shell.single_transformer_blocks)]
        self.blocks = tuple(
            _block_stage(name, block, names, hoist=hoist, last=index + 1 == len(blocks), fused=self.fused)
            for index, (name, block) in enumerate(blocks)
        )
        modulation = hoist_modulation(shell, ("norm_out",)) if hoist else ()
        self.head = Part(
            {"norm_out": shell.norm_out, "proj_out": shell.proj_out}, partial(_head, self.fused), names
        ).stage("head", modulation)
        check_covered(self)

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Position ids of the deprecated shape (B, tokens, 3) become (tokens, 3), as in diffusers."""
        given = check_arguments(inputs, needed=self._needed, model=type(self.module).__name__)
        for name in ("img_ids", "txt_ids"):
            if given[name].ndim == 3:
                given[name] = given[name][0]
        for name, tokens in (("img_ids", "hidden_states"), ("txt_ids", "encoder_hidden_states")):
            if given[name].shape[0] != given[tokens].shape[1]:
                raise ValueError(
                    f"{name} has {given[name].shape[0]} rows and {tokens} has {given[tokens].shape[1]} tokens: "
                    "give one position a token"
                )
        return given

    def constants(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """All legs of a product share one table while they have the same ids: 4.5 MiB each at 1024 pixels."""
        ids = inputs["txt_ids"], inputs["img_ids"]
        known = self._last_rope.of(ids) if self._last_rope is not None else None
        if known is not None:
            return known
        with torch.no_grad():
            cos, sin = self._pos_embed(torch.cat([each.to(self.device) for each in ids]))
        self._last_rope = _LastRope(ids, (cos, sin))
        return cos, sin

    def microbatch_constants(self, constants: Any, inputs: Mapping[str, Any]) -> Any:
        return constants

    def output(self, value: Tensor, return_dict: bool) -> Any:
        return diffusers_output(value, return_dict)


class _LastRope:
    """The table made last, as long as somebody else holds it, and the ids that it belongs to."""

    def __init__(self, ids: tuple[Tensor, Tensor], table: tuple[Tensor, Tensor]) -> None:
        self._ids = [weakref.ref(each) for each in ids]
        self._versions = _versions((*ids, *table))
        self._table = [weakref.ref(each) for each in table]

    def of(self, ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
        """The table, if it is still there and these are its ids, unchanged."""
        same = all(known() is each for known, each in zip(self._ids, ids, strict=True))
        cos, sin = (each() for each in self._table)
        if cos is None or sin is None or not same or self._versions is None:
            return None
        return (cos, sin) if self._versions == _versions((*ids, cos, sin)) else None


def _versions(values: tuple[Tensor, ...]) -> list[int] | None:
    """None for tensors of inference mode, whose changes nobody counts."""
    return None if any(each.is_inference() for each in values) else [each._version for each in values]


def _condition(embed: Any, inputs: Mapping[str, Any]) -> Tensor:
    # Rounded to the weights' dtype before the factor 1000, as in diffusers: bfloat16 moves t by up to 2 of 1000.
    dtype = embed.timestep_embedder.linear_1.weight.dtype
    timestep = inputs["timestep"].to(dtype) * 1000
    guidance = [inputs["guidance"].to(dtype) * 1000] if "guidance" in inputs else []
    temb: Tensor = embed(timestep, *guidance, inputs["pooled_projections"])
    return temb


def _stem(embedders: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return (
        embedders["x_embedder"](inputs["hidden_states"]),
        embedders["context_embedder"](inputs["encoder_hidden_states"]),
    )


def _block_stage(
    name: str, block: nn.Module, names: Mapping[int, str], *, hoist: bool, last: bool, fused: bool
) -> Stage:
    norms = ("norm1", "norm1_context") if hasattr(block, "norm1") else ("norm",)
    modulation = hoist_modulation(block, norms) if hoist else ()
    fused_block = joint_block if len(norms) == 2 else single_block

    def compute(block: Any, carried: tuple[Tensor, ...], condition: Tensor, rope: tuple[Tensor, Tensor]) -> Any:
        if fused:
            text, image = fused_block(block, carried[0], carried[1], condition, rope)
        else:
            hidden, context = carried
            text, image = block(
                hidden_states=hidden, encoder_hidden_states=context, temb=condition, image_rotary_emb=rope
            )
        return (image,) if last else (image, text)

    return Part(block, compute, names).stage(name, tuple(f"{name}.{linear}" for linear in modulation))


def _head(
    fused: bool, modules: Any, carried: tuple[Tensor, ...], condition: Tensor, rope: tuple[Tensor, Tensor]
) -> Tensor:
    norm = partial(modulated_output, modules["norm_out"]) if fused else modules["norm_out"]
    output: Tensor = modules["proj_out"](norm(carried[0], condition))
    return output
