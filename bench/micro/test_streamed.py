"""A streamed evaluation and its vector-Jacobian product beside the same module in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.micro.conftest import Measure
from leapalign.engine.model import StreamedModel
from leapalign.engine.passes.evaluation import Leg
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streaming.gradients import GradientDictionary

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=3)

BATCH, TEXT, SIDE = 2, 16, 8
PLAN = MemoryPlan(microbatch=1)  # streams every block


def transformer() -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return module.eval()


def inputs(device: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    found = {
        "hidden_states": torch.randn(BATCH, SIDE**2, 16),
        "timestep": torch.tensor([0.9, 0.4]),
        "encoder_hidden_states": torch.randn(BATCH, TEXT, 64),
        "pooled_projections": torch.randn(BATCH, 32),
        "guidance": torch.full((BATCH,), 3.5),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.randn(SIDE**2, 3),
    }
    return {name: value.to(device) for name, value in found.items()}


def weight_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@pytest.mark.parametrize("way", ["streamed", "plain"])
def test_evaluation(measure: Measure, device: str, way: str) -> None:
    module, given = transformer(), inputs(device)
    moved = weight_bytes(module)  # every weight is read once
    group = "evaluation of a tiny FLUX"
    if way == "streamed":
        model = StreamedModel(module, PLAN, device=device)
        found = measure(lambda: model.evaluate(given), group=group, moved=moved, device=device)
        model.close()
    else:
        module.to(device)
        with torch.no_grad():
            found = measure(lambda: module(**given).sample, group=group, moved=moved, device=device)
    assert found.shape == given["hidden_states"].shape


@pytest.mark.parametrize("way", ["streamed", "plain"])
def test_vjp(measure: Measure, device: str, way: str) -> None:
    module, given = transformer(), inputs(device)
    cotangent = torch.randn_like(given["hidden_states"])
    moved = 3 * weight_bytes(module)  # weights are read forward and backward, gradients written
    group = "products of a tiny FLUX"
    if way == "streamed":
        model, sink = StreamedModel(module, PLAN, device=device), GradientDictionary()
        leg = Leg(given, cotangent)
        measure(lambda: model.vjp([leg], params="deliver", sink=sink), group=group, moved=moved, device=device)
        assert sink.grads.keys() == dict(module.named_parameters()).keys()
        model.close()
    else:
        module.to(device)
        parameters = list(module.parameters())

        def products() -> tuple[Tensor, ...]:
            return torch.autograd.grad(module(**given).sample, parameters, cotangent)

        found = measure(products, group=group, moved=moved, device=device)
        assert len(found) == len(parameters)
