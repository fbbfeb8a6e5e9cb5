"""What is counted does not depend on whether operators are done once or every time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leapalign.engine.planning.counting import Counting, DeviceCounter, tensors
from leapalign.engine.planning.replay import Replay

META = torch.device("meta")


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.untyped_storage().nbytes()


@pytest.mark.parametrize(
    "work", [torch.exp, lambda x: x.sum(1), lambda x: torch.sort(x, dim=1), lambda x: x.contiguous()]
)
def test_a_functional_operator_gives_new_memory_of_the_same_shape(work):
    given = torch.empty(3, 4, 5, device=META).transpose(0, 2)
    expected = tensors(work(given))
    with Replay():
        first, second = tensors(work(given)), tensors(work(given))
    for found in (first, second):
        assert [described(each) for each in found] == [described(each) for each in expected]
    assert len({each.untyped_storage()._cdata for each in (*first, *second)}) == 2 * len(expected)


def test_views_and_changes_in_place_keep_their_memory():
    given = torch.empty(4, 6, device=META)
    with Replay():
        for _ in range(2):
            for found in (given.t(), given[1:], given.view(24), given.detach(), given.add_(1), given.split(2)[1]):
                assert found.untyped_storage()._cdata == given.untyped_storage()._cdata
            buffer = torch.empty(4, 6, device=META)
            assert torch.add(given, 1, out=buffer) is buffer


def test_a_step_is_counted_the_same():
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, device=META)

    def count(*modes):
        counter = DeviceCounter()
        inputs = torch.empty(2, 5, 16, device=META, requires_grad=True)
        for mode in modes:
            mode.__enter__()
        with Counting(counter):
            counter.hold([*model.parameters(), inputs], None)
            torch.autograd.grad(model(inputs).square().sum(), [inputs, *model.parameters()])
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
        return counter.peak, counter.flops

    recall = Replay()
    assert count() == count(recall) == count(recall)
    assert any(known is not None for known in recall._known.values())
