"""The streamed executors against Algorithm 1 written literally: every plan, every parameter; what they leave alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign import LeapAlign, alignment_gradients
from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.executors.autograd import surrogate_gradients
from leapalign.executors.reference import connect, discount
from leapalign.executors.streamed import streamed_rollout, streamed_vjps
from leapalign.method.surrogates import Leg, Surrogate
from leapalign.method.trajectory import rollout
from tests.executors.problems import BATCH, MODES, PAIRS, SIGMAS, bounded_reward

FACTORS: dict[str, tuple[Any, ...]] = {  # the first value of each is the base of the single changes
    "mode": ("streamed-paired", "streamed-held"),
    "family": ("flux-guidance", "flux", "sd3", "flux wide", "sd3 tall", "sd3 square"),
    "dtype": (torch.float64, torch.float32),
    "hoist": (True, False),
    "microbatch": (1, 2, None),
    "keep_block_inputs": (True, False),
    "block_inputs": ("host", "device"),
    "every": (1, 2),
    "slots": (2, 3),
    "resident": ("none", "all"),
    "alpha": (0.3, 1, 0),
    "threshold": (10.0, 0.5),  # all samples active; the second one is not
}


GRIDS = {"flux wide": (1, 5), "sd3 tall": (4, 1), "sd3 square": (3, 3)}  # image tokens, rows x columns


def pairwise(factors: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Settings in which every two values of any two factors meet, found greedily among random ones."""
    names, draw = list(factors), random.Random(0)
    waiting = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    while waiting:
        candidates = [{name: draw.randrange(len(factors[name])) for name in names} for _ in range(200)]
        covered = [{((a, c[a]), (b, c[b])) for a, b in itertools.combinations(names, 2)} & waiting for c in candidates]
        best = max(range(200), key=lambda index: len(covered[index]))
        waiting -= covered[best]
        if covered[best]:
            yield {name: factors[name][index] for name, index in candidates[best].items()}


def settings() -> list[Any]:
    base = {name: values[0] for name, values in FACTORS.items()}
    changes = [base] + [{**base, name: value} for name, values in FACTORS.items() for value in values[1:]]
    designs = [*changes, *pairwise(FACTORS)]
    return [pytest.param(d, id=" ".join(str(v).removeprefix("torch.") for v in d.values())) for d in designs]


def shaped(make_inputs: Any, family: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """The fixture's inputs, the latents of another shape where GRIDS says so."""
    noise, conditioning = make_inputs(family.partition(" ")[0], BATCH, dtype)
    if family not in GRIDS:
        return noise, conditioning
    rows, columns = GRIDS[family]
    generator = torch.Generator().manual_seed(31)
    if "img_ids" not in conditioning:
        shape: tuple[int, ...] = (BATCH, noise.shape[1], 2 * rows, 2 * columns)
    else:
        shape = (BATCH, rows * columns, noise.shape[2])
        grid = [(0, row, column) for row in range(rows) for column in range(columns)]
        conditioning["img_ids"] = torch.tensor(grid, dtype=dtype)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype), conditioning


@pytest.fixture(scope="module")
def expected() -> dict[Any, Any]:
    """Results of the reference executor that several settings share."""
    return {}


@pytest.mark.parametrize("design", settings())
def test_streamed_equals_the_literal_algorithm(
    design: dict[str, Any], expected: dict[Any, Any], make_transformer: Any, make_inputs: Any, worst_error: Any,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    if design["dtype"] == torch.float64:
        request.getfixturevalue("float64_throughout")
    family, dtype, method = design["family"], design["dtype"], LeapAlign(design["alpha"], 0.1, design["threshold"])
    noise, conditioning = shaped(make_inputs, family, dtype)
    transformer = make_transformer(family.partition(" ")[0], dtype)
    given = (conditioning, noise, SIGMAS, bounded_reward, method)
    key = (family, dtype, method)
    if key not in expected:
        expected[key] = alignment_gradients(transformer, *given, pairs=PAIRS, executor="reference")
    decisions = ("microbatch", "slots", "resident", "block_inputs", "every", "hoist", "keep_block_inputs")
    plan = MemoryPlan(**{name: design[name] for name in decisions})
    model = StreamedModel(transformer, plan, device="cpu")
    try:
        result = alignment_gradients(model, *given, pairs=PAIRS, executor=design["mode"])
    finally:
        model.close()
    error, name = worst_error(result.grads, expected[key].grads)
    assert error <= 1, f"{name}: {error:.2g} times the tolerance"
    assert result.grads.keys() == {name for name, _ in transformer.named_parameters()}
    assert any(gradient.any() for gradient in result.grads.values())
    # The rollout's microbatches and hoisted sums differ by roundings, which four steps of a network carry on.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
    for field in ("rewards", "loss", "weights", "d_j", "d_0"):
        found = getattr(result, field)
        torch.testing.assert_close(found, getattr(expected[key], field), rtol=tolerance, atol=tolerance)


def test_the_design_covers_every_pair_of_values() -> None:
    designs = [parameter.values[0] for parameter in settings()]
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(design[a], design[b]) for design in designs}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("mode", "keep"), [("paired", True), ("paired", False), ("held", True)])
@pytest.mark.parametrize(("legs", "alpha"), [(1, 0.3), (2, 0), (3, 0.3)])
def test_any_number_of_legs(
    legs: int, alpha: float, keep: bool, mode: Any, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    """Against the decoupled executor, whose legs run one after another through plain autograd; some g are zero."""
    transformer = make_transformer("flux-guidance", torch.float64)
    noise, conditioning = make_inputs("flux-guidance", BATCH, torch.float64)
    steps = [[0, 1, 3], [1, 2, 3], [0, 2, 3]]
    chosen = torch.tensor([row[3 - legs :] for row in steps])
    generator = torch.Generator().manual_seed(9)
    g = torch.randn(noise.shape, generator=generator, dtype=torch.float64)
    g[0] = 0
    coefficients = torch.randn(legs, BATCH, generator=generator, dtype=torch.float64)
    unused = torch.zeros(BATCH)
    surrogate = Surrogate(
        tuple(Leg(chosen[:, -1 - index], coefficients[index]) for index in range(legs)), alpha, unused, unused, unused
    )
    trajectory = rollout(transformer, conditioning, noise, SIGMAS, keep=chosen)
    grads = surrogate_gradients(transformer, conditioning, trajectory, surrogate, g)
    model = StreamedModel(transformer, MemoryPlan(), device="cpu")
    sink = Once()
    rolled = streamed_rollout(model, conditioning, noise, SIGMAS, chosen.tolist(), keep_block_inputs=keep)
    torch.testing.assert_close(rolled.trajectory.latents, trajectory.latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rolled.trajectory.velocities, trajectory.velocities, rtol=1e-12, atol=1e-12)
    streamed_vjps(model, conditioning, rolled, surrogate, g, mode=mode, sink=sink, active=[1, 2])
    rolled.drop()
    model.close()
    assert worst_error({name: sink.grads[name] for name in grads}, grads)[0] <= 1
    assert sink.grads.keys() == grads.keys()


class Once:
    """A sink that sees to it that every gradient comes once and in the accumulation dtype; on the device."""

    on_host = False

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        for name, gradient in gradients.items():
            assert name not in self.grads, f"{name} was delivered twice"
            whole = gradient.expand(torch.float64) if isinstance(gradient, OuterProduct) else gradient.clone()
            assert whole.dtype == torch.float64
            self.grads[name] = whole


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("hoist", [True, False])
@pytest.mark.parametrize("alpha", [0.3, 1])
@pytest.mark.parametrize("family", ["flux-guidance", "sd3"])
def test_a_foreign_loop_of_two_nested_calls(
    family: str, alpha: float, hoist: bool, make_transformer: Any, make_inputs: Any, worst_error: Any
) -> None:
    """Two leaps of its own, with `backward()`; gradients of weights, of the latents and of the prompt embeddings."""
    noise, conditioning = make_inputs(family, BATCH, torch.float64)
    s_k, s_j = torch.tensor([1.0, 0.9, 0.7], dtype=torch.float64), torch.tensor([0.4, 0.3, 0.2], dtype=torch.float64)
    scale = 1000 if family == "sd3" else 1
    shape = (BATCH, *[1] * (noise.ndim - 1))

    def loop(model: nn.Module) -> dict[str, Tensor]:
        leaves = {"x": noise.clone(), "text": conditioning["encoder_hidden_states"].clone()}
        given = {**conditioning, "encoder_hidden_states": leaves["text"].requires_grad_()}

        def v(x: Tensor, s: Tensor) -> Tensor:
            velocity: Tensor = model(hidden_states=x, timestep=s * scale, return_dict=False, **given)[0]
            return velocity

        x_k = leaves["x"].requires_grad_()
        x_j = connect(x_k - (s_k - s_j).reshape(shape) * v(x_k, s_k), 0.5 * noise)
        x_0 = x_j - s_j.reshape(shape) * v(discount(x_j, alpha), s_j)
        (1 - bounded_reward(x_0)).mean().backward()
        found = {name: leaf.grad for name, leaf in leaves.items()} | {n: p.grad for n, p in model.named_parameters()}
        gradients = {name: gradient.clone() for name, gradient in found.items() if gradient is not None}
        for parameter in model.parameters():
            parameter.grad = None
        return gradients

    transformer = make_transformer(family, torch.float64)
    expected = loop(transformer)
    model = StreamedModel(transformer, MemoryPlan(hoist=hoist), device="cpu")
    found = loop(model)
    again = loop(model)
    model.close()
    zeros = {name: torch.zeros_like(gradient) for name, gradient in found.items()}  # None and zero are the same
    assert worst_error(found, {**zeros, **expected})[0] <= 1
    assert all(torch.equal(found[name], again[name]) for name in found)  # nothing was left behind


class BlockFlow(nn.Module):
    """A small flow of somebody else's: v = head(x + tanh blocks), streamed through the generic backbone."""

    timestep_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, pooled_projections: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        inputs = {"hidden_states": hidden_states, "timestep": timestep, "pooled_projections": pooled_projections}
        (x,) = self.enter(self, inputs)
        for block in self.blocks:
            (x,) = self.step(block, (x,), None)
        return (self.leave(self, (x,), None),)

    @staticmethod
    def enter(module: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor]:
        shift = inputs["timestep"][:, None].to(inputs["hidden_states"]) + inputs["pooled_projections"]
        return (module.stem(inputs["hidden_states"] + shift[:, None]),)

    @staticmethod
    def step(block: Any, carried: tuple[Tensor, ...], _: Any) -> tuple[Tensor]:
        return (carried[0] + torch.tanh(block(carried[0])),)

    @staticmethod
    def leave(module: Any, carried: tuple[Tensor, ...], _: Any) -> Tensor:
        velocity: Tensor = module.head(carried[0])
        return velocity

    def streamed(self, plan: MemoryPlan, delay: Callable[[str], float] | None = None) -> StreamedModel:
        backbone = SequentialBackbone(
            self, self.blocks, self.enter, self.leave, block=self.step, device=torch.device("cpu")
        )
        return StreamedModel(backbone, plan, delay=delay)


def block_flow_problem() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(12)
    noise, pooled = torch.randn(2, 5, 4, generator=generator), torch.randn(2, 4, generator=generator)
    reward = bounded_reward
    return {"pooled_projections": pooled}, noise, torch.tensor([1.0, 0.6, 0.0]), reward, LeapAlign(threshold=10.0)


@pytest.mark.parametrize("mode", MODES)
def test_somebody_elses_flow_through_the_generic_backbone(mode: Any, worst_error: Any) -> None:
    given = block_flow_problem()
    expected = alignment_gradients(BlockFlow(), *given, executor="reference")
    model = BlockFlow().streamed(MemoryPlan())
    found = alignment_gradients(model, *given, executor=mode)
    model.close()
    assert worst_error(found.grads, expected.grads)[0] <= 1


def test_200_steps_with_random_delays_give_the_same_bits() -> None:
    """Every copy takes up to 0.4 ms more in three of four runs; other slots, placement of copies and modes in turn."""
    compare_bits(lambda *arguments: BlockFlow().streamed(*arguments), block_flow_problem(), runs=200)


def test_hoisted_steps_with_random_delays_give_the_same_bits(make_transformer: Any, make_inputs: Any) -> None:
    noise, conditioning = make_inputs("flux-guidance", 2)
    sigmas = torch.tensor([1.0, 0.6, 0.0])

    def streamed(plan: MemoryPlan, delay: Callable[[str], float]) -> StreamedModel:
        return StreamedModel(make_transformer("flux-guidance"), plan, device="cpu", delay=delay)

    compare_bits(streamed, (conditioning, noise, sigmas, bounded_reward, LeapAlign(threshold=10.0)), runs=12)


def compare_bits(streamed: Callable[..., StreamedModel], given: tuple[Any, ...], runs: int) -> None:
    draw, scale = random.Random(5), 0.0
    plans = [MemoryPlan(slots=slots, keep_block_inputs=keep) for slots in (2, 3) for keep in (True, False)]
    models = [streamed(plan, lambda _: scale * draw.random()) for plan in plans]
    first = {mode: alignment_gradients(models[0], *given, executor=mode) for mode in MODES}
    assert any(gradient.any() for gradient in first["streamed-held"].grads.values())
    for run in range(runs):
        mode = MODES[run % 2]
        scale = 4e-4 * (run // 2 % 4) / 3
        found = alignment_gradients(models[run // 4 % 4], *given, executor=mode)
        for name, gradient in first[mode].grads.items():
            assert torch.equal(found.grads[name], gradient), (run, name)
    for model in models:
        model.close()
