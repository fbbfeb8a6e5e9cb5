"""Blocks of FLUX and SD3 on the fused kernels: diffusers' modules, and in one pass what lies between their linears.

The blocks' own linears run as they are; what lies between them is `kernels.modulate`, `kernels.gated`,
`kernels.gated_modulate` and, inside attention, `kernels.qk_norm_rope`. All of these compute in float32 and round once,
where the plain code rounds every intermediate; they save their inputs and two float32 statistics a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.modulation import modulation_vectors
from leapalign.kernels.blocks.gated import gated_residual
from leapalign.kernels.blocks.gated_modulate import gated_residual_modulate
from leapalign.kernels.blocks.modulate import layer_norm_modulate
from leapalign.kernels.dispatch import reaches_device

# The classes whose forward is written out here; subclasses may do something else.
_BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock", "JointTransformerBlock")
_PROCESSORS = ("FluxAttnProcessor", "JointAttnProcessor2_0")
LARGEST_HALF = 65504


def joint_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, condition: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """FluxTransformerBlock and JointTransformerBlock: (text (B, text tokens, D) or None, image (B, image tokens, D)).

    Args:
        block: of a template; its norms may be hoisted.
        hidden_states, encoder_hidden_states: (B, tokens, D) of the image and of the text.
        condition: (B, width) modulation vectors if the norms are hoisted, else (B, D) temb.
        rope: (cos, sin) for FLUX.
    """
    shift, scale, gate, *rest = modulation_vectors(block.norm1, condition)
    last = bool(getattr(block, "context_pre_only", False))
    if last:
        c_scale, c_shift = modulation_vectors(block.norm1_context, condition)
    else:
        c_shift, c_scale, c_gate, *c_rest = modulation_vectors(block.norm1_context, condition)
    eps, c_eps = block.norm1.norm.eps, block.norm1_context.norm.eps
    attention, context = block.attn(
        hidden_states=layer_norm_modulate(hidden_states, shift, scale, eps),
        encoder_hidden_states=layer_norm_modulate(encoder_hidden_states, c_shift, c_scale, c_eps),
        **({} if rope is None else {"image_rotary_emb": rope}),
    )
    mlp, dual = rest[:3], rest[3:]
    if dual:  # SD3.5's second attention reads the block's input once more
        shift2, scale2, gate2 = dual
        second = block.attn2(hidden_states=layer_norm_modulate(hidden_states, shift2, scale2, eps))
        hidden_states = gated_residual(hidden_states, gate, attention)
        gate, attention = gate2, second
    image = _feed_forward(block.norm2, block.ff, hidden_states, gate, attention, mlp)
    if last:
        return None, image
    text = _feed_forward(block.norm2_context, block.ff_context, encoder_hidden_states, c_gate, context, c_rest)
    return _clipped(text), image


def single_block(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, condition: Tensor,
    rope: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FluxSingleTransformerBlock; arguments and results as of `joint_block`."""
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation_vectors(block.norm, condition)
    normed = layer_norm_modulate(tokens, shift, scale, block.norm.norm.eps)
    mlp = block.act_mlp(block.proj_mlp(normed))
    attention = block.attn(hidden_states=normed, image_rotary_emb=rope)
    result = _clipped(gated_residual(tokens, gate, block.proj_out(torch.cat([attention, mlp], dim=2))))
    text = encoder_hidden_states.shape[1]
    return result[:, :text], result[:, text:]


def modulated_output(norm: Any, hidden_states: Tensor, condition: Tensor) -> Tensor:
    """AdaLayerNormContinuous before the last projection: (B, tokens, D)."""
    scale, shift = modulation_vectors(norm, condition)
    return layer_norm_modulate(hidden_states, shift, scale, norm.norm.eps)


def runs_fused(kernels: str, shell: nn.Module, device: torch.device) -> bool:
    """Whether a template's blocks take the fused kernels.

    Args:
        kernels: "torch": no; "triton": yes, and where Triton does not reach the device their references in torch run;
            "auto": where Triton reaches it and the blocks are as diffusers makes them.
        shell: the template, its norms not hoisted yet.

    Raises:
        ValueError: "triton" for blocks whose forward is not known here.
    """
    if kernels == "torch" or (kernels == "auto" and not reaches_device(device)):
        return False
    reason = not_fusable(shell)
    if reason is not None and kernels == "triton":
        raise ValueError(
            f"kernels = triton knows the blocks that diffusers makes, but {reason}: choose kernels = torch"
        )
    return reason is None


def not_fusable(shell: nn.Module) -> str | None:
    """Why these blocks cannot run on the fused kernels; None if they can. Before norms are hoisted out of them."""
    for name, module in shell.named_modules():
        if name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and name.count(".") == 1:
            if type(module).__name__ not in _BLOCKS:
                return f"{name} is a {type(module).__name__}"
            if getattr(module, "_chunk_size", None) is not None:
                return f"{name} runs its feed-forward in chunks"
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            return f"{name} has weights"
        processor = getattr(module, "processor", None)
        if processor is not None:
            if type(processor).__name__ not in _PROCESSORS:
                return f"{name} runs on a {type(processor).__name__}"
            if getattr(module, "fused_projections", False):
                return f"{name} has fused projections"
            for norms in (("norm_q", "norm_k"), ("norm_added_q", "norm_added_k")):
                if reason := _unlike([getattr(module, norm, None) for norm in norms]):
                    return f"{'/'.join(norms)} of {name} {reason}"
    return None


def _feed_forward(
    norm: Any, layers: Any, tokens: Tensor, gate: Tensor, attention: Tensor, vectors: list[Tensor]
) -> Tensor:
    """tokens + gate attention, and then the gated feed-forward of their modulated norm."""
    shift, scale, gate_mlp = vectors
    tokens, normed = gated_residual_modulate(tokens, gate, attention, shift, scale, norm.eps)
    return gated_residual(tokens, gate_mlp, layers(normed))


def _clipped(tokens: Tensor) -> Tensor:
    return tokens.clip(-LARGEST_HALF, LARGEST_HALF) if tokens.dtype == torch.float16 else tokens


def _unlike(norms: list[Any]) -> str | None:
    """Why a pair of norms of q and k is not what the kernel computes."""
    if norms == [None, None]:
        return None
    if None in norms or any("RMSNorm" not in type(norm).__name__ for norm in norms):
        return "are not both RMSNorm"
    if any(norm.weight is None or getattr(norm, "bias", None) is not None for norm in norms):
        return "have no weight, or a bias"
    return "have different eps" if len({norm.eps for norm in norms}) > 1 else None
