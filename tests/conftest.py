"""Tiny transformers and analytic flows with fixed seeds, and the measure by which gradients are compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TEXT_TOKENS, CHANNELS, TEXT_DIM, POOLED_DIM = 3, 4, 12, 10
GRID = (2, 3)  # image tokens of the FLUX fixtures, rows x columns


def _flux(guidance_embeds: bool) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )


def _sd3() -> nn.Module:
    """SD3.5's features: q and k normalised, dual attention in the first block; the last block drops its context."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=6,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=32,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


@pytest.fixture(scope="session")
def make_transformer() -> Callable[..., nn.Module]:
    """make(family, dtype) -> a new tiny transformer, the same weights every time.

    Families: "flux", "flux-guidance" (embedded guidance), "sd3". Every parameter is moved off its initial value:
    no bias is zero and no norm's weight is one.
    """

    def make(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(20)
            transformer = _sd3() if family == "sd3" else _flux(guidance_embeds=family == "flux-guidance")
            with torch.no_grad():
                for parameter in transformer.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return transformer.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """make(family, batch, dtype) -> (noise, conditioning) for `make_transformer(family)`; no two samples are alike."""

    def make(family: str, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(30)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        conditioning = {
            "encoder_hidden_states": normal(batch, TEXT_TOKENS, TEXT_DIM),
            "pooled_projections": normal(batch, POOLED_DIM),
        }
        rows, columns = GRID
        if family == "sd3":
            return normal(batch, CHANNELS, 2 * rows, 2 * columns), conditioning
        ids = torch.zeros(rows, columns, 3, dtype=dtype)
        ids[..., 1] += torch.arange(rows)[:, None]
        ids[..., 2] += torch.arange(columns)
        conditioning |= {"img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(TEXT_TOKENS, 3, dtype=dtype)}
        if family == "flux-guidance":
            conditioning["guidance"] = torch.linspace(1.5, 4.5, batch)
        return normal(batch, rows * columns, CHANNELS), conditioning

    return make


class LinearFlow(nn.Module):
    """v = x A^T + sigma b + pooled_projections, row by row: every Jacobian is known in closed form."""

    timestep_scale = 1.0

    def __init__(self, channels: int = CHANNELS, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(40)
        self.a = nn.Parameter(0.5 * torch.randn(channels, channels, generator=generator, dtype=dtype))
        self.b = nn.Parameter(torch.randn(channels, generator=generator, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        assert not return_dict
        drift = timestep[:, None] * self.b + pooled_projections
        return (hidden_states @ self.a.T + drift[:, None],)


@pytest.fixture(scope="session")
def linear_flow() -> type[LinearFlow]:
    return LinearFlow


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


@pytest.fixture(scope="session")
def worst_error() -> Callable[[dict[str, Tensor], dict[str, Tensor]], tuple[float, str]]:
    """worst(found, expected) -> the largest relative error of a parameter's gradient, as a fraction of the tolerance
    (1e-10 in float64, 2e-5 in float32), and that parameter's name. At most 1 passes.

    The error is |found - expected| / |expected|, except where the expected gradient is next to nothing. An element is
    a sum of up to 54 terms in these tests (2 legs x 3 samples x 9 tokens). Where they cancel, what is left carries
    their rounding, about sqrt(54) half-ulps of a typical element, however small it is itself. It is then compared on
    the scale at which that rounding is just the tolerance: |expected| is taken to be at least
    sqrt(54) (eps / 2) / tolerance = 2% (float32) or 8e-6 (float64) of a typical gradient of that many elements,
    typical being the root mean square over all parameters. If every gradient is zero, only zero will do.
    """

    def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
        assert found.keys() == expected.keys()
        elements = torch.cat([gradient.flatten() for gradient in expected.values()])
        assert elements.isfinite().all()
        typical = elements.square().mean().sqrt().item()
        tolerance = TOLERANCE[elements.dtype]
        floor = 54**0.5 * torch.finfo(elements.dtype).eps / 2 / tolerance * typical
        errors = [(0.0, "")]
        for name, gradient in expected.items():
            assert (found[name].dtype, found[name].shape) == (gradient.dtype, gradient.shape), name
            difference = (found[name] - gradient).norm().item()
            scale = max(gradient.norm().item(), floor * gradient.numel() ** 0.5)
            if difference != 0:  # NaN included
                errors.append(
                    (difference / scale / tolerance if scale and difference == difference else math.inf, name)
                )
        return max(errors)

    return worst


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the two float32 detours out of diffusers: rope and RMSNorm's variance, forward and backward.

    They round to float32 whatever the model's dtype, so two float64 results that differ in the last bit may leave them
    6e-8 apart. With them, float64 agreement is decided by luck with roundings, not by the executors.
    """
    from diffusers.models import normalization
    from diffusers.models.transformers import transformer_flux

    def rope(x: Tensor, freqs: tuple[Tensor, Tensor], sequence_dim: int = 2, **_: Any) -> Tensor:
        shape = [1, 1, *freqs[0].shape] if sequence_dim == 2 else [1, freqs[0].shape[0], 1, freqs[0].shape[1]]
        cos, sin = (f.to(x.dtype).reshape(shape) for f in freqs)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin

    def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden_states, self.dim, self.weight, self.eps)

    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", rope)
    monkeypatch.setattr(normalization.RMSNorm, "forward", rms_norm)
