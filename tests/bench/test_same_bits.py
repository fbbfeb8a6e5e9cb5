"""The weights after 50 optimizer steps: the same bits wherever things were, rounding level where sums are reordered.

Same bits (8-bit AdamW, bfloat16 weights): optimizer on host or device, slots, resident blocks, where block inputs wait,
every n-th of them, kept by the rollout or not, reward recomputed or not. All of these repeat the same operations on the
same numbers. The update gives the same bits with two threads as with one.

Rounding level (float32 weights): held against paired, and the microbatch. Both add the same products in another order.
So does torch with another number of threads, in CPU products with a matrix of one row, as the modulation linears have.
"""

from __future__ import annotations

import pytest
import torch

from bench.training.bits import ORDER, PLACE, YARDSTICK, Change, Snapshot, Task, different, distance, snapshot, train
from leapalign.data.embeddings import embed_prompts
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.zoo.shapes import PIPELINE_FOLDER
from tests.families.tiny_pipeline import PROMPTS, RESOLUTION, ColourReward, save_tiny_pipeline

STEPS = 50
FEW = 2  # for one change alone: the second step reads the moments from the first one's codes


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
    cache = tmp_path_factory.mktemp("cache")
    embeddings = embed_prompts(folder, PROMPTS, max_sequence_length=6, cache_dir=cache)
    return Task(str(folder), PROMPTS, embeddings, ColourReward(), RESOLUTION)


# ---- the same bits -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(task: Task) -> dict[int, Snapshot]:
    """Everything streamed, one row at a time, updates on the host, one thread; weights and states by step."""
    return train(task, Change(), keep=[0, FEW, STEPS], dtype=torch.bfloat16)


def test_all_places_at_once_leave_every_bit_after_50_steps(task: Task, base: dict[int, Snapshot]) -> None:
    found = train(task, PLACE["all at once"], keep=[STEPS], dtype=torch.bfloat16)
    assert not different(found[STEPS], base[STEPS])
    assert len(different(base[0], base[STEPS])) == len(base[0]), "every weight and state takes part"


@pytest.mark.parametrize("name", [name for name, change in PLACE.items() if 1 <= len(change.plan) <= 2])
def test_each_place_alone_leaves_every_bit(name: str, task: Task, base: dict[int, Snapshot]) -> None:
    """Where the test above fails, this says which; two changes that undo each other would be found here."""
    found = train(task, PLACE[name], keep=[FEW], dtype=torch.bfloat16)
    assert not different(found[FEW], base[FEW])


def test_the_update_gives_the_same_bits_with_two_threads() -> None:
    """Of `shapes`, whose largest weights (98,304 elements) are above the least that torch gives a thread (32,768).

    The gradients are given: how torch multiplies matrices may depend on the threads.
    """
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = StreamedModel.from_pretrained(PIPELINE_FOLDER / "transformer", device="cpu")
            optimizer = model.optimizer = AdamW8bit(lr=1e-2, clip="block")
            optimizer.bind(model)
            start, generator = snapshot(model), torch.Generator().manual_seed(0)
            for _ in range(FEW):
                with optimizer.in_backward() as sink:
                    for unit, layout in model.store.units.items():
                        sink(unit, {n: torch.randn(shape, generator=generator) for n, shape in layout.shapes.items()})
            found.append(snapshot(model))
            model.close()
    finally:
        torch.set_num_threads(before)
    assert len(different(start, found[0])) == len(start)
    assert not different(found[1], found[0])


# ---- rounding level ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base32(task: Task) -> dict[int, Snapshot]:
    """Paired, one row at a time."""
    return train(task, Change(), keep=[0, 1, STEPS], dtype=torch.float32)


@pytest.fixture(scope="module")
def bound(task: Task, base32: dict[int, Snapshot]) -> dict[int, float]:
    """{step: distance} at which a run is that has as much error in its gradients as two executors may have."""
    found = train(task, YARDSTICK, keep=[1, STEPS], dtype=torch.float32)
    return {step: distance(base32[step], values, base32[0]) for step, values in found.items()}


def test_reordered_sums_lead_no_further_apart_than_rounding_after_50_steps(
    task: Task, base32: dict[int, Snapshot], bound: dict[int, float]
) -> None:
    change = Change(plan={**ORDER["held"].plan, **ORDER["microbatch 2"].plan})
    found = train(task, change, keep=[STEPS], dtype=torch.float32)
    assert 0 < distance(base32[STEPS], found[STEPS], base32[0]) <= bound[STEPS]


@pytest.mark.parametrize("name", ["held", "microbatch 2"])
def test_each_reordered_sum_alone_is_within_rounding(
    name: str, task: Task, base32: dict[int, Snapshot], bound: dict[int, float]
) -> None:
    found = train(task, ORDER[name], keep=[1], dtype=torch.float32)
    assert 0 < distance(base32[1], found[1], base32[0]) <= bound[1]


def test_a_gradient_without_its_nested_part_is_far_beyond_rounding(
    task: Task, base32: dict[int, Snapshot], bound: dict[int, float]
) -> None:
    """What the bound is there to find: a first leg that got lost."""
    found = train(task, Change(alpha=0.0), keep=[1], dtype=torch.float32)
    assert distance(base32[1], found[1], base32[0]) > 10 * bound[1]
