"""The velocity of a flow transformer as a plain function of tensors: one call convention for every backbone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# What a backbone calls a timestep, per unit of sigma: FLUX multiplies by 1000 inside, SD3 expects 0..1000.
_TIMESTEP_SCALES = {"FluxTransformer2DModel": 1.0, "SD3Transformer2DModel": 1000.0}

# Position ids (tokens, 3) are shared by the whole batch.
_UNBATCHED = frozenset({"txt_ids", "img_ids"})


def timestep_scale(transformer: nn.Module) -> float:
    """Factor from sigma in [0, 1] to the `timestep` argument of this transformer: 1 for FLUX, 1000 for SD3.

    Decided by the class (subclasses, `torch.compile` and data-parallel wrappers included). Another flow transformer
    with diffusers' call signature states its own factor in an attribute `timestep_scale`.

    Raises:
        ValueError: the class is unknown and has no `timestep_scale`.
    """
    for module in (transformer, getattr(transformer, "_orig_mod", None), getattr(transformer, "module", None)):
        declared = getattr(module, "timestep_scale", None)
        if isinstance(declared, (int, float)):
            return float(declared)
        for base in type(module).__mro__:
            if base.__name__ in _TIMESTEP_SCALES:
                return _TIMESTEP_SCALES[base.__name__]
    raise ValueError(
        f"transformer {type(transformer).__name__} is not supported: use one of {', '.join(_TIMESTEP_SCALES)}, "
        "or give it the attribute timestep_scale (1.0 if it takes t in [0, 1], 1000.0 if it takes 0..1000)"
    )


def velocity(
    transformer: nn.Module,
    latents: Tensor,
    sigma: Tensor,
    conditioning: Mapping[str, Any],
    *,
    scale: float | None = None,
) -> Tensor:
    """v_theta(x, sigma, conditioning) = dx/dsigma = noise - data, differentiable wherever the caller enables it.

    Args:
        latents: (B, ...) float32 or float64; cast to the transformer's dtype on the way in.
        sigma: (B,) or () noise levels in [0, 1]. The timestep is passed on in this dtype: bfloat16 would move it by
            up to 2/1000, so it is never cast here.
        conditioning: the transformer's own keyword arguments for these B rows.
        scale: `timestep_scale(transformer)` where the caller already knows it.

    Returns:
        (B, ...) in the dtype of `latents`.
    """
    scale = timestep_scale(transformer) if scale is None else scale
    timestep = sigma.expand(latents.shape[0]) * scale
    output = transformer(
        hidden_states=latents.to(_dtype(transformer)), timestep=timestep, return_dict=False, **conditioning
    )
    result: Tensor = output[0]
    return result.to(latents.dtype)


def select(conditioning: Mapping[str, Any], index: Tensor | slice) -> dict[str, Any]:
    """The rows `index` of every batched tensor in `conditioning`.

    `txt_ids` and `img_ids` have no batch dimension and pass through, as do scalars and whatever is not a tensor.
    """
    return {name: value[index] if is_batched(name, value) else value for name, value in conditioning.items()}


def is_batched(name: str, value: Any) -> bool:
    """Whether this conditioning entry has one row a sample."""
    return isinstance(value, Tensor) and value.ndim > 0 and name not in _UNBATCHED


def microbatches(size: int, microbatch: int | None) -> Iterator[slice]:
    """Consecutive slices of at most `microbatch` rows that cover `size` rows; one slice when it is None."""
    step = microbatch or size
    for start in range(0, size, max(step, 1)):
        yield slice(start, min(start + step, size))


@contextmanager
def evaluation_mode(transformer: nn.Module) -> Iterator[None]:
    """Run the transformer without dropout, and leave every submodule's `training` flag as it was.

    The vector-Jacobian products must be taken at the rollout's own function, so both run in this mode.
    """
    training = [module for module in transformer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _dtype(transformer: nn.Module) -> torch.dtype:
    """The dtype the transformer computes in: its own word (diffusers' `dtype`), else its first floating parameter's."""
    declared = getattr(transformer, "dtype", None)
    if isinstance(declared, torch.dtype):
        return declared
    return next(p.dtype for p in transformer.parameters() if p.is_floating_point())
