"""The device's update by the kernels' operators: the interpreter's checks, the references in torch, and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.memory.devices import HostAndDevice
from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.optimizer.update import Group, Updater
from leapalign.engine.passes.evaluation import Leg
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.planning.counting import ALLOCATION, DeviceCounter
from tests.kernels.interpreter import run_interpreted

STEPS = 2
TERMS = 2


def test_under_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the interpreter is Triton's: pip install triton")
    run_interpreted("check_update")


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    """Copies of every byte that a step may change, by name."""
    model.streamer.drain()
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        states = model.optimizer.state[parameter]
        found |= {f"{name}/{kind}": v.clone() for kind, v in states.items() if isinstance(v, torch.Tensor)}
    return found


@pytest.mark.parametrize("master", ["stochastic", "residual"])
def test_operators_have_the_bits_of_the_definition(master: Any, make_transformer: Any, make_inputs: Any) -> None:
    results = []
    latents, conditioning = make_inputs("flux", 2, torch.bfloat16)
    inputs = {"hidden_states": latents, "timestep": torch.tensor([0.9, 0.5]), **conditioning}
    options: dict[str, Any] = {"lr": 1e-2, "clip": "block", "max_grad_norm": 0.05, "ema_decay": 0.9, "master": master}
    for placement, kernels in (("host", "torch"), ("device", "torch"), ("device", "triton")):
        optimizer = AdamW8bit(placement=placement, kernels=kernels, **options)  # type: ignore[arg-type]
        model = StreamedModel(make_transformer("flux", torch.bfloat16), MemoryPlan(), optimizer, device="cpu")
        start = snapshot(model)
        for _ in range(STEPS):
            with optimizer.in_backward() as sink:
                model.vjp([Leg(inputs, torch.ones_like(latents) / 64)], params="deliver", sink=sink)
        results.append(snapshot(model))
        model.close()
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in start)
    assert sum(not torch.equal(start[name], results[0][name]) for name in start) > len(start) / 2


@pytest.mark.parametrize("factors", [False, True])
def test_triton_needs_no_memory_but_the_slot(factors: bool) -> None:
    """Of the device, counted: a copy of the left factors, which are columns of something wider, and nothing more."""
    rows, columns = 512, 64
    peaks, device = {}, torch.device("meta")
    for kernels in ("torch", "triton"):
        counter = DeviceCounter()
        with HostAndDevice() as machine, machine.observed(counter.observe):
            module = nn.Module()
            module.blocks = nn.ModuleList([nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)])
            backbone = SequentialBackbone(
                module,
                module.blocks,
                stem=lambda m, inputs: (inputs["x"],),
                head=lambda m, carried, c: carried[0],
                device=device,
            )
            model = StreamedModel(
                backbone, arena=lambda sizes: {name: torch.empty(n, dtype=torch.uint8) for name, n in sizes.items()}
            )
            options: dict[str, Any] = {"placement": "device", "master": "residual", "ema": True}
            updater = Updater(model, kernels=kernels, **options)
            gradient: torch.Tensor | OuterProduct = torch.zeros(rows, columns, device=device)
            if factors:
                left = torch.zeros(TERMS, rows + 4, device=device)[:, 2:-2]
                gradient = OuterProduct(left, torch.zeros(TERMS, columns, device=device))
            before = counter.current
            with counter.phase("update"):
                groups = {"blocks.0.weight": Group(1e-3, 0.9, 0.999, 1e-8, 0.0)}
                updater.update(
                    "blocks.0", {"blocks.0.weight": gradient}, groups, step=1, scale=1.0, seed=0, ema_decay=0.9
                )
            peaks[kernels] = counter.phases["update"].counted_bytes - before
    assert peaks["triton"] <= (-(-TERMS * rows * 4 // ALLOCATION) * ALLOCATION if factors else 0)
    assert peaks["torch"] > 4 * model.weights.slot_bytes  # w, m, v and the gradient in float32, at the least
