"""A visiting model's tensors are on the device inside the block, and the same objects with the same bits outside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leapalign.engine.memory.module_visit import Guest, visiting

CPU, META = torch.device("cpu"), torch.device("meta")


def model() -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False).half())
    made[0].register_buffer("empty", torch.empty(0))
    made[1].register_module("again", made[0])  # shared: one tensor, one copy
    return made.requires_grad_(False)


def first(module: nn.Module) -> Tensor:
    return next(module.parameters())


def test_tensors_come_and_go() -> None:
    module = model()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    objects = [*module.parameters(), *module.buffers()]
    guest, homes = Guest(module, pin=False), [value.data_ptr() for value in module.parameters()]
    assert all(home % 512 == 0 for home in homes), "kernels may take their widest loads"
    for _ in range(2):  # a second visit finds the same home
        with guest.on(CPU):
            away = [value.data_ptr() for value in module.parameters()]
            assert not set(away) & set(homes)
            with guest.on(CPU):  # nested
                pass
            assert away == [value.data_ptr() for value in module.parameters()], "the inner block ended the visit"
        assert homes == [value.data_ptr() for value in module.parameters()]
    assert all(now is then for now, then in zip([*module.parameters(), *module.buffers()], objects, strict=True))
    for name, value in module.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_visit_to_a_gpu() -> None:
    module, device = model().float().eval(), torch.device("cuda")
    x = torch.randn(4, 5)
    expected = module(x)
    for _ in range(2):
        with visiting(module, device):
            assert {value.device.type for value in module.parameters()} == {"cuda"}
            torch.testing.assert_close(module(x.to(device)).cpu(), expected)
        assert {value.device.type for value in module.parameters()} == {"cpu"} and first(module).is_pinned()
    assert torch.equal(module(x), expected)


def test_the_visitor_computes_the_same_and_gradients_reach_its_input() -> None:
    module = model().float().eval()
    x = torch.randn(4, 5, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), x)[0]
    guest = Guest(module, pin=False)
    with guest.on(CPU):  # other memory on the same device
        found = torch.autograd.grad(module(x).square().sum(), x)[0]
        here = [value.data_ptr() for value in module.parameters()]
    assert torch.equal(found, expected)
    assert not set(here) & {value.data_ptr() for value in module.parameters()}


def test_what_is_done_on_the_device_is_lost_and_an_error_ends_the_visit() -> None:
    module = model()
    guest, before = Guest(module, pin=False), first(module).clone()
    try:
        with guest.on(CPU):
            first(module).zero_()
            raise FloatingPointError
    except FloatingPointError:
        pass
    assert torch.equal(first(module), before)


def test_on_the_cpu_and_elsewhere_nothing_moves() -> None:
    module, away = model(), model().to(META)
    pointers = [value.data_ptr() for value in module.parameters()]
    with visiting(module, torch.device("cpu")), visiting(away, META):
        assert pointers == [value.data_ptr() for value in module.parameters()]
    assert "_guest" not in module.__dict__ and "_guest" not in away.__dict__
