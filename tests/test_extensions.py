"""A toy method, executor, reward, family and command, each one file outside the package, found and used."""

import importlib
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from leapalign import alignment_gradients, extensions, families
from leapalign.commands.main import main
from leapalign.config.loading import load_config
from leapalign.errors import UsageError
from leapalign.rewards.loading import load_reward, tower_of
from tests.families.tiny_pipeline import save_tiny_pipeline

METHOD = """
    import math
    from dataclasses import dataclass

    import torch

    from leapalign.method.surrogates import Leg, Surrogate


    @dataclass(frozen=True)
    class OneStep:
        '''Differentiates one step i drawn uniformly: x_0 ~ x_i - s_i v(x_i).'''

        threshold: float = math.inf
        legs: int = 1

        def draw(self, batch, num_steps, generator, /):
            return torch.randint(num_steps, (batch, 1), generator=generator)

        def surrogate(self, trajectory, steps, /):
            (step,) = steps.unbind(1)
            ones = trajectory.final.new_ones(len(steps))
            return Surrogate((Leg(step, -trajectory.sigmas[step]),), 0.0, ones, ones, ones)
"""
EXECUTOR = """
    import dataclasses

    from leapalign.executors.autograd import autograd


    class Doubled:
        delivers = streams = False

        def __call__(self, task, /):
            return autograd(dataclasses.replace(task, scale=2 * task.scale))


    doubled = Doubled()
"""
REWARD = """
    class Brightness:
        def load(self, name, device):
            return lambda images, prompts: images.mean((1, 2, 3))

        def tower(self, name):
            return None


    reward = Brightness()
"""
FAMILY = """
    from leapalign.families.flux import Flux


    class Toy(Flux):
        name = "toy"
        pipeline_class = "ToyPipeline"
        published = {"toys/toy": {"_class_name": "FluxTransformer2DModel"}}


    family = Toy()
"""
COMMAND = """
    TEXT = "print the name that is given"
    OPTIONS = {"name": {"default": "toy"}}
    TAKES_CONFIG = False


    def run(options):
        print(f"hello {options.name}")
        return 0
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Writes a module into a folder on the path; with a group also the entry point that an installed package has."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str, group: str | None = None, value: str | None = None) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        if group:
            info = tmp_path / f"{name}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[leapalign.{group}]\ntoy = {value}\n")

    return write


class Linear(torch.nn.Module):
    """v = W x, called as a FLUX transformer is."""

    timestep_scale = 1.0
    dtype = torch.float64

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(3, dtype=torch.float64) / 2)

    def forward(self, hidden_states, timestep, return_dict=False):
        return (hidden_states @ self.weight,)


def arguments(steps: int = 4) -> tuple[Any, ...]:
    noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Linear(), {}, noise, torch.linspace(1, 0, steps + 1, dtype=torch.float64), lambda x: x.sum((1, 2)) - 50


def literal(model, noise, sigmas, step):
    """d/dW of -sum(x_i - s_i W x_i) / B at the rollout's x_i, active everywhere: written out."""
    with torch.no_grad():
        x = [noise]
        for i in range(len(sigmas) - 1):
            x.append(x[-1] + (sigmas[i + 1] - sigmas[i]) * (x[-1] @ model.weight))
    total = torch.zeros_like(model.weight)
    for b, i in enumerate(step.flatten().tolist()):
        total += sigmas[i] * x[i][b].T @ torch.ones_like(x[i][b]) / len(noise)
    return total


def test_a_method_from_outside(outside) -> None:
    outside("toy_method", METHOD)
    OneStep = importlib.import_module("toy_method").OneStep

    model, conditioning, noise, sigmas, reward = arguments()
    found = alignment_gradients(model, conditioning, noise, sigmas, reward, OneStep(threshold=0.0))
    assert found.pairs.shape == (2, 1)
    expected = literal(model, noise, sigmas, found.pairs)
    torch.testing.assert_close(found.grads["weight"], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="method OneStep does not run in executor='reference'"):
        alignment_gradients(model, conditioning, noise, sigmas, reward, OneStep(), executor="reference")


@pytest.mark.parametrize("by", ["entry point", "module:name"])
def test_an_executor_from_outside(outside, by) -> None:
    outside("toy_executor", EXECUTOR, *(("executors", "toy_executor:doubled") if by == "entry point" else ()))
    from leapalign import LeapAlign

    gradients: Any = alignment_gradients
    name = "toy" if by == "entry point" else "toy_executor:doubled"
    given: Any = arguments()
    pairs = torch.tensor([[0, 2], [1, 3]])
    once = gradients(*given, LeapAlign(threshold=0.0), pairs=pairs)
    twice = gradients(*given, LeapAlign(threshold=0.0), pairs=pairs, executor=name)
    assert once.grads["weight"].any()
    torch.testing.assert_close(twice.grads["weight"], 2 * once.grads["weight"], rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"executor='{name}' takes no sink"):
        gradients(*given, LeapAlign(), executor=name, sink=object())


def test_a_reward_from_outside(outside) -> None:
    outside("toy_reward", REWARD, "rewards", "toy_reward:reward")
    for name in ("toy", "toy_reward:reward"):
        config = load_config("shapes", [f"--reward={name}"])
        scores = load_reward(config.reward, None, torch.device("cpu"))(torch.full((2, 3, 4, 4), 0.25), ["a", "b"])
        assert scores.tolist() == [0.25, 0.25] and tower_of(config.reward, None) is None


def test_a_family_from_outside(outside, tmp_path) -> None:
    outside("toy_family", FAMILY, "families", "toy_family:family")
    from leapalign.families.pipeline import load_pipeline

    folder = save_tiny_pipeline(tmp_path / "pipeline")
    index = Path(folder) / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "ToyPipeline"))
    assert load_pipeline(str(folder)).family.name == "toy"
    assert "toys/toy" in {name for each in families.every() for name in each.published}
    index.write_text(index.read_text().replace("ToyPipeline", "OtherPipeline"))
    with pytest.raises(UsageError, match="is a OtherPipeline; only FluxPipeline, ToyPipeline are supported"):
        load_pipeline(str(folder))


def test_a_command_from_outside(outside, capsys) -> None:
    outside("toy_command", COMMAND, "commands", "toy_command")
    assert main(["toy", "--name", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert main(["--help"]) == 0
    assert "print the name that is given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "reward='nothing': choose one of own, or write module:name"),
        ("no_such_module:x", "there is no module no_such_module"),
        ("leapalign.errors:Nothing", "leapalign.errors has no Nothing"),
    ],
)
def test_what_is_not_there_is_named(name, message) -> None:
    with pytest.raises(UsageError, match=message):
        extensions.load("rewards", {"own": "leapalign.errors:UsageError"}, name, key="reward")


def test_a_module_that_misses_another_says_which(outside) -> None:
    outside("toy_broken", "import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        extensions.load("rewards", {}, "toy_broken:x", key="reward")


def test_an_installed_package_does_not_replace_our_own(outside) -> None:
    outside("toy_thief", "stolen = 1", "rewards", "toy_thief:stolen")
    assert extensions.names("rewards", {"toy": "ours:own"}) == {"toy": "ours:own"}
