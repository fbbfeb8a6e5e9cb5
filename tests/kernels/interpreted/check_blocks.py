"""A whole FLUX and a whole SD3 on the kernels, interpreted; run by tests/engine/backbones/test_fused_blocks.py."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign.engine.backbones import backbone_of
from tests.engine.backbones.test_backbones import composed

CPU = torch.device("cpu")


def gradients(model: nn.Module, backbone: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    output = composed(backbone, weights, inputs)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    found = torch.autograd.grad(output, list(weights.values()), cotangent, allow_unused=True)
    return {"output": output} | {name: g for name, g in zip(weights, found, strict=True) if g is not None}


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_gradients_are_those_of_the_plain_blocks(make_transformer: Any, make_inputs: Any, family: str, hoist: bool):
    """Against float64, the errors of kernels and plain operators are alike: both are float32's.

    A float32 gradient of these models is off by 1e-6 of its norm (2^-24 a rounding, some hundred of them and sums of
    some dozens of terms); a wrong formula by 1.
    """
    found = {}
    for name, kernels, dtype in (
        ("exact", "torch", torch.float64),
        ("plain", "torch", torch.float32),
        ("fused", "auto", torch.float32),
    ):
        model = make_transformer(family, dtype)
        noise, inputs = make_inputs(family, 2, dtype)
        timestep = torch.tensor([0.25, 0.75], dtype=dtype) * (1000 if family == "sd3" else 1)
        inputs |= {"hidden_states": noise, "timestep": timestep}
        backbone = backbone_of(model, hoist=hoist, device=CPU, kernels=kernels)
        assert backbone.fused == (name == "fused")  # "auto" takes Triton where it reaches, and here it does
        found[name] = gradients(model, backbone, inputs)
    for key, exact in found["exact"].items():
        size = float(exact.norm()) or 1.0  # the last block's text queries have no gradient: it must be 0
        plain, fused = (float((found[name][key] - exact).norm()) / size for name in ("plain", "fused"))
        assert fused <= max(1e-5, 4 * plain), (key, fused, plain)
