"""Transformers in stages: FLUX and SD3 by their class, any sequence of blocks through `SequentialBackbone`."""

from __future__ import annotations

import torch
from torch import nn

from leapalign.engine.backbones.flux import FluxBackbone
from leapalign.engine.backbones.sd3 import SD3Backbone
from leapalign.engine.backbones.sequential import SequentialBackbone
from leapalign.engine.backbones.stage import Backbone, Stage

__all__ = ["Backbone", "FluxBackbone", "SD3Backbone", "SequentialBackbone", "Stage", "backbone_of"]

_FAMILIES: dict[str, type[FluxBackbone] | type[SD3Backbone]] = {
    "FluxTransformer2DModel": FluxBackbone,
    "SD3Transformer2DModel": SD3Backbone,
}


def backbone_of(
    module: nn.Module, *, hoist: bool, device: torch.device, kernels: str = "torch", attention: str = "auto"
) -> Backbone:
    """The stages of a diffusers transformer, by its class (subclasses included); the module is not modified.

    Args:
        module: FluxTransformer2DModel or SD3Transformer2DModel; its weights may be anywhere, also on meta. Buffers are
            copied to `device` now and must hold their values.
        hoist: take the adaLN linears out of the blocks (see `Stage.modulation`).
        device: where the stages will run.
        kernels: "torch": diffusers' own arithmetic; "triton": norms, modulation, residuals and rotation of the blocks
            by the fused kernels, or by their references in torch where Triton does not reach the device; "auto": the
            kernels where Triton reaches it and the blocks are as diffusers makes them.
        attention: a backend of diffusers' dispatcher, "native", "cudnn", "flash" or "xformers"; "auto": the module's.

    Raises:
        ValueError: another class; parameters that the stages do not use; with `hoist`, an adaLN that is not plain;
            blocks that the kernels do not know; a backend that cannot run there.
    """
    for base in type(module).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__](module, hoist=hoist, device=device, kernels=kernels, attention=attention)
    raise ValueError(
        f"transformer {type(module).__name__} is not one of {', '.join(_FAMILIES)}: say what its stem, blocks and head "
        "are with SequentialBackbone"
    )
