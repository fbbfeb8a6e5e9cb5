"""Joint attention of text and image tokens through diffusers' dispatcher, and the backends that one may ask for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leapalign.kernels.blocks.qk_norm_rope import qk_norm_rope

Attention = Literal["auto", "native", "cudnn", "flash", "xformers"]

# our name -> diffusers' name, and the package that it needs. "native" lets torch choose among its own kernels.
_BACKENDS: dict[str, tuple[str, str | None]] = {
    "native": ("native", None),
    "cudnn": ("_native_cudnn", None),
    "flash": ("flash", "flash_attn"),
    "xformers": ("xformers", "xformers"),
}
_EXTRAS = {"flash": "flash-attn", "xformers": "xformers"}


class JointAttention:
    """A processor for diffusers' FluxAttention and SD3's Attention: projections, norms, rotation, attention, output.

    Called as diffusers calls a processor: tokens (B, T, D), in FLUX's double blocks and in SD3 with a second stream
    (B, text tokens, D) that attends together with them and comes out as the second result.

    Args:
        fused: q and k are normalised and rotated by `kernels.qk_norm_rope`; else by the module's norms (SD3 only,
            which rotates nothing).
        text_first: the second stream's tokens stand before the others, as in FLUX; in SD3 they follow.
    """

    _attention_backend: Any = None  # diffusers' names, and found by its own set_attention_backend
    _parallel_config = None

    def __init__(self, *, fused: bool, text_first: bool) -> None:
        self._fused, self._text_first = fused, text_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        from diffusers.models.attention_dispatch import dispatch_attention_fn  # seconds, and loaded with the model

        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        tokens = self._projected(
            attn, hidden_states, ("to_q", "to_k", "to_v", "norm_q", "norm_k"), image_rotary_emb, text
        )
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
            others = self._projected(attn, encoder_hidden_states, names, image_rotary_emb, 0)
            pairs = zip(others, tokens, strict=True) if self._text_first else zip(tokens, others, strict=True)
            tokens = [torch.cat(pair, dim=1) for pair in pairs]
        query, key, value = tokens
        found = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )  # fmt: skip
        found = found.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return _output(attn, found)
        image = found.shape[1] - text
        parts = [text, image] if self._text_first else [image, text]
        first, second = found.split(parts, dim=1)
        hidden, context = (second, first) if self._text_first else (first, second)
        if not attn.context_pre_only:
            context = attn.to_add_out(context.contiguous())
        return _output(attn, hidden.contiguous()), context

    def _projected(
        self, attn: Any, tokens: Tensor, names: tuple[str, ...], rope: tuple[Tensor, Tensor] | None, first: int
    ) -> list[Tensor]:
        """q, k and v of one stream, (B, T, heads, head_dim); `first` is the position of its first token."""
        query, key, value = (getattr(attn, name)(tokens).unflatten(-1, (attn.heads, -1)) for name in names[:3])
        norm_q, norm_k = (getattr(attn, name) for name in names[3:])
        if self._fused:
            cos, sin = rope or (None, None)
            if norm_q is not None or rope is not None:
                weights = [None if norm is None else norm.weight for norm in (norm_q, norm_k)]
                eps = 1e-6 if norm_q is None else norm_q.eps
                query, key = qk_norm_rope(query, key, weights[0], weights[1], cos, sin, eps, first)
        elif norm_q is not None:
            query, key = norm_q(query), norm_k(key)
        return [query, key, value]


def _output(attn: Any, tokens: Tensor) -> Tensor:
    if getattr(attn, "pre_only", False) or attn.to_out is None:
        return tokens
    result: Tensor = attn.to_out[1](attn.to_out[0](tokens))
    return result


def set_processors(shell: nn.Module, *, fused: bool, text_first: bool) -> None:
    """Give all attention modules of a template a `JointAttention`."""
    for module in shell.modules():
        if getattr(module, "processor", None) is not None:
            module.processor = JointAttention(fused=fused, text_first=text_first)  # type: ignore[assignment]


def set_attention(shell: nn.Module, backend: str, device: torch.device) -> None:
    """Let the processors of a template use this backend; "auto" leaves them as the user's model has them.

    On meta it is torch's own, which counts as flash attention: every backend holds as little.
    """
    check_attention(backend, device)
    if backend == "auto":
        return
    name, _ = _BACKENDS["native" if device.type == "meta" else backend]
    for module in shell.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_attention_backend"):
            processor._attention_backend = name


def check_attention(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Say what is wrong before anything runs.

    Args:
        dtype: of the weights; None: not known yet.

    Raises:
        ValueError: an unknown backend, a missing package, or a device or dtype for which it has no kernel.
    """
    if backend not in get_args(Attention):
        raise ValueError(f"attention = {backend} is unknown: choose {', '.join(get_args(Attention))}")
    if backend in ("auto", "native") or device.type == "meta":
        return
    package = _BACKENDS[backend][1]
    if package is not None and find_spec(package) is None:
        extra = _EXTRAS[backend]
        raise ValueError(
            f"attention = {backend} needs {extra}, which is not installed: pip install 'leapalign[{extra}]', or choose "
            "attention = native"
        )
    if device.type != "cuda":
        raise ValueError(f"attention = {backend} runs on a CUDA GPU, not on {device}: choose attention = native")
    if dtype is not None and dtype not in (torch.bfloat16, torch.float16):
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"attention = {backend} has no kernel for {kind}: choose weight_dtype = bf16 or attention = native"
        )
