"""One call convention for every backbone: timesteps, dtypes, row selection, modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leapalign.engine.backbones.velocity import evaluation_mode, microbatches, select, timestep_scale, velocity


class Recorder(nn.Module):
    """Keeps the keyword arguments of its calls and answers in its own dtype."""

    timestep_scale = 1.0

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.calls: list[dict[str, Any]] = []

    def forward(self, **given: Any) -> tuple[torch.Tensor]:
        self.calls.append(given)
        return (given["hidden_states"] * self.weight,)


class Unknown(nn.Module):
    pass


def test_timestep_scale_of_the_families(make_transformer: Any) -> None:
    flux, sd3 = make_transformer("flux"), make_transformer("sd3")
    assert timestep_scale(flux) == 1.0
    assert timestep_scale(sd3) == 1000.0
    compiled: Any = torch.compile(sd3)
    assert timestep_scale(compiled) == 1000.0
    sd3.__class__ = type("FSDPSD3Transformer2DModel", (type(sd3),), {})  # what fully_shard does
    assert timestep_scale(sd3) == 1000.0
    assert timestep_scale(Recorder(torch.float32)) == 1.0


def test_an_unknown_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown is not supported.*FluxTransformer2DModel.*timestep_scale"):
        timestep_scale(Unknown())


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float32])
def test_the_timestep_keeps_sigmas_dtype_whatever_the_models(scale: float, model_dtype: torch.dtype) -> None:
    """bfloat16 holds 0.9531 and 0.957 next to each other: sigma 0.955 must arrive as it is."""
    model = Recorder(model_dtype)
    model.timestep_scale = scale
    latents, sigma = torch.randn(2, 3, 4), torch.tensor([0.955, 0.1])
    v = velocity(model, latents, sigma, {"guidance": None})
    (call,) = model.calls
    assert call["timestep"].dtype == torch.float32
    assert torch.equal(call["timestep"], sigma * scale)
    assert call["hidden_states"].dtype == model_dtype
    assert call["return_dict"] is False
    assert call["guidance"] is None
    assert v.dtype == latents.dtype
    assert torch.equal(v, latents.to(model_dtype).float())


def test_a_single_sigma_serves_the_whole_batch() -> None:
    model = Recorder(torch.float64)
    velocity(model, torch.zeros(3, 2, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64), {})
    assert torch.equal(model.calls[0]["timestep"], torch.full((3,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("family", ["flux", "flux-guidance", "sd3"])
def test_it_is_the_transformers_output(family: str, make_transformer: Any, make_inputs: Any) -> None:
    transformer = make_transformer(family)
    latents, conditioning = make_inputs(family, 2)
    sigma = torch.tensor([0.9, 0.3])
    timestep = sigma * 1000 if family == "sd3" else sigma
    expected = transformer(hidden_states=latents, timestep=timestep, **conditioning).sample
    assert torch.equal(velocity(transformer, latents, sigma, conditioning), expected)


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), slice(0, 2)])
def test_select_takes_rows_of_batched_tensors_only(index: Any) -> None:
    rows = torch.arange(6.0).reshape(3, 2)
    attention = {"scale": 1.0}
    given: dict[str, Any] = {"encoder_hidden_states": rows, "guidance": rows[:, 0], "txt_ids": rows, "img_ids": rows}
    given |= {"shift": torch.tensor(3.0), "joint_attention_kwargs": attention, "nothing": None}
    chosen = select(given, index)
    assert torch.equal(chosen["encoder_hidden_states"], rows[index])
    assert torch.equal(chosen["guidance"], rows[index][:, 0])
    for name in ("txt_ids", "img_ids", "shift", "joint_attention_kwargs", "nothing"):
        assert chosen[name] is given[name]


def test_microbatches_cover_the_batch() -> None:
    assert list(microbatches(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert list(microbatches(5, None)) == list(microbatches(5, 9)) == [slice(0, 5)]
    assert list(microbatches(0, None)) == []


def test_evaluation_mode_restores_every_modules_flag() -> None:
    frozen = nn.Dropout()
    model = nn.Sequential(nn.Dropout(), nn.Sequential(frozen, nn.Linear(2, 2)))
    model.train()
    frozen.eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="interrupted"), evaluation_mode(model):
        raise ValueError("interrupted")
    assert [module.training for module in model.modules()] == before
