"""Is what runs on this device right? Kernels against float64, updates bit against bit, streamed steps against autograd.

Every check is a row; one that fails, or cannot run, does not keep the others from running.

- Kernels (the cases of `bench kernels`, small, and at FLUX.1's width): errors relative to the largest magnitude. They
  compute in float32 and round once to bfloat16, by 2^-8 at most if to nearest and 2^-7 stochastically; a rounded value
  may enter another one: 2^-6. In float32 the longest sums are trees of some dozens of additions: 1e-5.
- Updates: one AdamW step after the other by the definition on the host, by the kernels on the device, and in C++.
  No bit may differ.
- Steps: gradients of LeapAlign by the streamed engine, and by plain autograd in the same dtype on the same device, both
  against float64. All executors round alike, so the streamed one may be off by 4 times what autograd is, and by 2e-5 in
  float32 anyway. A thousand times the noise levels and the guidance are exact in bfloat16, to which FLUX casts them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.kernels import cases as kernel_cases
from bench.kernels import command as kernels
from bench.kernels import optimizer_cases
from bench.kernels.cases import Case, Shapes
from bench.speed import random_models
from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.plan import MemoryPlan
from leapalign.gradients import alignment_gradients
from leapalign.kernels.adamw8bit import definition as adamw8bit
from leapalign.kernels.adamw8bit import host as host_adamw8bit
from leapalign.kernels.adamw8bit.definition import Hyper
from leapalign.kernels.adamw8bit.device import expand, update_outer, update_triton
from leapalign.kernels.adamw8bit.quantize import blocks_of
from leapalign.method.draws import draw_noise, draw_steps
from leapalign.method.leapalign import LeapAlign

Row = dict[str, Any]  # "key", "passed", and what was found
Check = Callable[[], Row]
BOUNDS = {"bf16": 2.0**-6, "fp32": 1e-5}
WIDE = {"text": 16, "samples": 2, "parameters": 2**20 + 4096}  # with FLUX.1's 24 heads of 128
SIGMAS, GUIDANCE = (1.0, 0.5, 0.25, 0.125, 0.0), 4.0
BATCH = 3
PLANS = {
    "streamed": MemoryPlan(),
    "held, every 2nd block input on the device": MemoryPlan(
        mode="held", microbatch=2, block_inputs="device", every=2, keep_block_inputs=False
    ),
    "all resident, whole batch": MemoryPlan(resident="all", microbatch=None, reward_residency="off"),
}
_TESTS = ("test_arena.py", "test_streamer.py", "test_streamed.py", "test_visiting.py")
_ROOT = Path(__file__).parents[2]


def checks(device: torch.device, *, wide: bool) -> Iterator[tuple[str, Check]]:
    """(key, check) of all of them; `wide` takes kernels at FLUX.1's width, too."""
    for name, shapes in (("small", Shapes(64, **kernels._TINY)), *([("wide", Shapes(64, **WIDE))] if wide else [])):
        for case in (*kernel_cases.cases(shapes, device), *optimizer_cases.cases(shapes, device)):
            key = f"{case.name} {case.dtype}, {name}"
            yield key, partial(_kernel, case, device)
    for weights, kind in product(("bf16", "fp32"), ("stochastic", "residual", "master")):
        if weights == "bf16" or kind == "stochastic":
            yield f"update, {weights} {kind}", partial(_update, weights, kind, device)
    yield "update, outer products", partial(_outer, device)
    yield "update by the engine", partial(_engine, device)
    for (plan, settings), dtype, arithmetic in product(PLANS.items(), ("fp32", "bf16"), ("torch", "triton")):
        key = f"step, {plan}, {dtype}, kernels {arithmetic}"
        yield key, partial(_step, settings, dtype, arithmetic, device)
    yield "tests of the suite that need a GPU", _suite


def checked(key: str, check: Check) -> Row:
    """The check's row, or one that says why there is none."""
    try:
        return {"key": key, **check()}
    except Exception as error:
        words = (str(error).strip() or "no message").splitlines()[0]
        return {"key": key, "passed": False, "error": f"{type(error).__name__}: {words[:300]}"}


# ---- kernels -------------------------------------------------------------------------------------------------------


def _kernel(case: Case, device: torch.device) -> Row:
    tensors = case.inputs(torch.Generator(device).manual_seed(0))
    expected = case.exact(tensors)
    prepare = case.ways["leapalign"]
    assert not isinstance(prepare, str)
    found = kernels._error(prepare(tensors)(), expected)
    return {"passed": found <= BOUNDS[case.dtype], "largest_error": found, "bound": BOUNDS[case.dtype]}


# ---- updates -------------------------------------------------------------------------------------------------------


def _update(weights: str, kind: str, device: torch.device) -> Row:
    """Three steps of 10,340 elements: definition on the host, kernel on the device, and C++."""
    count, dtype = 40 * 256 + 100, torch.bfloat16 if weights == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(count, generator=generator)
    gradients = [torch.randn(count, generator=generator).exp() * 1e-3 for _ in range(3)]

    def states(where: torch.device) -> dict[str, Tensor]:
        found = {"weights": start.to(dtype, copy=True)}
        found |= {name: torch.zeros(count, dtype=torch.uint8) for name in ("codes_m", "codes_v")}
        found |= {name: torch.zeros(blocks_of(count)) for name in ("absmax_m", "absmax_v")}
        found["ema"] = found["weights"].clone()
        if kind == "residual":
            found["residual"] = torch.zeros(count, dtype=torch.int8)
        if kind == "master":
            found["master"] = start.clone()
        return {name: tensor.to(where) for name, tensor in found.items()}

    ways: dict[str, tuple[Callable[..., Any], torch.device]] = {
        "definition": (adamw8bit.update, torch.device("cpu")),
        "device": (update_triton, device),
        "C++": (host_adamw8bit.update, torch.device("cpu")),
    }
    results = {}
    for way, (update, where) in ways.items():
        memory = states(where)
        for step, gradient in enumerate(gradients, 1):
            hp = Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01, step)
            options = {"seed": 7, "parameter": 3, "ema_decay": 0.9, "scale": 0.5}
            handle = update(gradient=gradient.to(where), hp=hp, **memory, **options)
            if handle is not None:
                handle.wait()
        results[way] = {name: tensor.cpu() for name, tensor in memory.items()}
    return _same_bits(results)


def _outer(device: torch.device) -> Row:
    """A gradient of factors, expanded inside the kernel and before it."""
    terms, rows, columns = 3, 23, 256
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(terms, size, generator=generator).bfloat16() for size in (rows, columns))
    count, hp = rows * columns, Hyper(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    results = {}
    for way, where in (("definition", torch.device("cpu")), ("device", device)):
        codes = [torch.zeros(count, dtype=torch.uint8, device=where) for _ in range(2)]
        absmax = [torch.zeros(blocks_of(count), device=where) for _ in range(2)]
        weights = torch.linspace(-1, 1, count).bfloat16().to(where)
        states = codes[0], absmax[0], codes[1], absmax[1]
        if way == "device":
            matrix = weights.view(rows, columns)
            update_outer(matrix, left.to(where), right.to(where), *states, hp, seed=7, parameter=3)
        else:
            adamw8bit.update(weights, expand(left, right).view(-1), *states, hp, seed=7, parameter=3)
        results[way] = {str(index): tensor.cpu() for index, tensor in enumerate((weights, *states))}
    return _same_bits(results)


class _Chain(nn.Module):
    timestep_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(columns, rows) for rows, columns in ((40, 64), (23, 256), (200, 19)))
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16()


def _engine(device: torch.device) -> Row:
    """The same gradients through the optimizer's sink: on the host, and on the device with its states travelling."""
    results = {}
    for placement, arithmetic in (("host", "auto"), ("device", "torch"), ("device", "triton")):
        chain = _Chain()
        backbone = SequentialBackbone(
            chain, chain.blocks, stem=lambda m, i: (i["x"],), head=lambda m, carried, c: carried[0], device=device
        )
        optimizer = AdamW8bit(lr=1e-2, clip="block", placement=placement, kernels=arithmetic)  # type: ignore[arg-type]
        model = StreamedModel(backbone, MemoryPlan(kernels="torch"), optimizer)
        where = torch.device("cpu") if placement == "host" else device
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            with optimizer.in_backward() as sink:
                for unit, layout in model.store.units.items():
                    gradients: dict[str, Tensor | OuterProduct] = {}
                    for name, shape in layout.shapes.items():
                        drawn = [torch.randn(3, size, generator=generator).to(where) for size in shape]
                        gradients[name] = OuterProduct(*drawn) if len(drawn) == 2 else drawn[0][0].clone()
                    if gradients:
                        sink(unit, gradients)
        model.streamer.drain()
        found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            states = optimizer.state[parameter]
            found |= {f"{name} {kind}": value.clone() for kind, value in states.items() if isinstance(value, Tensor)}
        results[f"{placement}, {arithmetic}"] = found
        model.close()
    return _same_bits(results)


def _same_bits(results: Mapping[str, Mapping[str, Tensor]]) -> Row:
    (first, expected), *others = results.items()
    different = [
        f"{name} by {way}, not {first}"
        for way, found in others
        for name, tensor in found.items()
        if not torch.equal(tensor.view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8))
    ]
    return {"passed": not different, "compared": list(results), "different": different}


# ---- steps ---------------------------------------------------------------------------------------------------------


def _step(plan: MemoryPlan, dtype: str, arithmetic: str, device: torch.device) -> Row:
    of = torch.bfloat16 if dtype == "bf16" else torch.float32
    exact = _oracle("reference", torch.float64, of, device)
    plain = _distance(_oracle("autograd", of, of, device), exact)
    streamed = _distance(_gradients("streamed", of, of, device, plan, arithmetic), exact)
    bound = max(4 * plain, 2e-5 if dtype == "fp32" else 0.0)
    return {"passed": streamed <= bound < 0.5, "error": streamed, "bound": bound, "error_of_autograd": plain}


@functools.cache
def _oracle(executor: Any, dtype: torch.dtype, of: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return _gradients(executor, dtype, of, device)


def _gradients(
    executor: Any, dtype: torch.dtype, of: torch.dtype, device: torch.device, plan: MemoryPlan | None = None,
    arithmetic: str = "torch",
) -> dict[str, Tensor]:  # fmt: skip
    """LeapAlign's gradients of the tiny FLUX whose weights are numbers of the dtype `of`; on the CPU in float64."""
    sizes = random_models.tiny()
    model: Any = random_models.transformer(sizes, torch.device("cpu"), of)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    home = torch.device("cpu") if executor == "streamed" else device
    tokens = (sizes.resolution // sizes.patch) ** 2
    embeds = random_models.embeddings(sizes, BATCH)
    conditioning = {name: value.to(of).to(home, dtype) for name, value in embeds.items()}
    conditioning["txt_ids"] = torch.zeros(sizes.text_tokens, 3, device=home, dtype=dtype)
    conditioning["img_ids"] = torch.arange(3 * tokens, device=home).view(tokens, 3).to(dtype)
    conditioning["guidance"] = torch.full((BATCH,), GUIDANCE, device=home)
    if executor == "streamed":
        assert plan is not None
        model = StreamedModel(model, replace(plan, kernels=arithmetic), device=device)  # type: ignore[arg-type]
    else:
        model.to(device)
    found = alignment_gradients(
        model,
        conditioning,
        draw_noise(0, 0, range(BATCH), (tokens, sizes.transformer["in_channels"])).to(home),
        torch.tensor(SIGMAS),
        lambda latents: torch.tanh(latents).flatten(1).mean(1),
        LeapAlign(alpha=0.3, tau=0.1, threshold=10.0),
        pairs=draw_steps(LeapAlign(), 0, 0, range(BATCH), len(SIGMAS) - 1),
        executor=executor,
    )
    if isinstance(model, StreamedModel):
        model.close()
    return {name: gradient.double().cpu() for name, gradient in found.grads.items()}


def _distance(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """|found - exact| / |exact| over all parameters; infinite for a missing one."""
    if found.keys() != exact.keys():
        return float("inf")
    difference = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    return float((difference / sum(float(gradient.square().sum()) for gradient in exact.values())) ** 0.5)


# ---- the suite -----------------------------------------------------------------------------------------------------


class _Counts:
    """A pytest plugin that counts how tests end."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: list[str] = []
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(f"{report.nodeid}: {str(report.longrepr).strip().splitlines()[-1][:200]}")
        elif report.skipped:
            self.skipped.append(report.nodeid)
        elif report.when == "call":
            self.passed.append(report.nodeid)


def _suite() -> Row:
    """Those with "gpu" in their names, in this process: loading the packages again would take as long as the tests."""
    if kernel_cases.optional("pytest") is None or kernel_cases.optional("hypothesis") is None:
        return {"passed": True, "absent": "pytest or hypothesis is not installed"}
    import pytest

    counts = _Counts()
    files = [str(_ROOT / "tests" / "engine" / name) for name in _TESTS]
    quiet = ["-p", "no:cacheprovider", "-p", "no:warnings"]
    code = pytest.main(["-q", *quiet, "-k", "gpu", "--rootdir", str(_ROOT), *files], plugins=[counts])
    passed = int(code) == 0 and not counts.failed
    return {"passed": passed, "tests_passed": counts.passed, "tests_failed": counts.failed,
            "tests_skipped": counts.skipped}  # fmt: skip
