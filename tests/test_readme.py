"""README is short, its snippets run as printed, and what it and docs/ tell a reader to type or follow is there."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import leapalign
from bench.__main__ import COMMANDS as BENCH
from leapalign.commands.main import _commands, _parser
from leapalign.config.loading import load_config, split_overrides
from leapalign.data.embeddings import embed_prompts
from leapalign.families.pipeline import load_pipeline
from leapalign.families.source import resolve_model
from leapalign.method.draws import draw_noise

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROMPTS = ["a red circle", "two blue squares", "a green cross", "a blue triangle"]


class Net(torch.nn.Module):
    """A stem, blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))


def fenced(path: Path, language: str = "") -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def readers_names() -> dict[str, Any]:
    """What README and docs/embedding.md say that the reader has, of the packaged pipeline."""
    pipeline = load_pipeline("shapes")
    embeds = embed_prompts(resolve_model("shapes"), PROMPTS, max_sequence_length=9).batch(PROMPTS)
    noise = draw_noise(0, 0, range(len(PROMPTS)), pipeline.latent_shape(32))
    return {
        "transformer": pipeline.transformer,
        "conditioning": pipeline.conditioning(embeds, 32, 1.0),
        "noise": noise,
        "latents": noise,
        "target": torch.zeros_like(noise),
        "timestep": torch.ones(len(PROMPTS)),
        "sigmas": pipeline.sigmas(3, 32),
        "reward": lambda latents: latents.mean((1, 2)),
        "velocity": lambda x, s: -x * s[:, None, None],
        "k": torch.full((len(PROMPTS),), 0.75),
        "j": torch.full((len(PROMPTS),), 0.25),
        **{f"rollout_{name}": (noise * scale).requires_grad_() for name, scale in (("k", 0.9), ("j", 0.5), ("0", 0.1))},
        "net": Net(),
        "batch": torch.ones(2, 4),
    }


def test_readme_takes_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", ["README.md", "docs/embedding.md", "docs/methods.md"])
def test_snippets_run_as_printed(page: str, readers_names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    snippets = fenced(ROOT / page, "python")
    assert snippets
    before = {name: p.detach().clone() for name, p in readers_names["transformer"].named_parameters()}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), readers_names)
    if page == "README.md":
        after = dict(readers_names["model"].named_parameters())
        assert any(not torch.equal(after[name], value) for name, value in before.items()), "nothing was updated"
        readers_names["model"].close()
    if page == "docs/embedding.md":
        assert readers_names["rollout_k"].grad.any() and readers_names["rollout_j"].grad is None
        assert all(each.grad is not None for each in readers_names["net"].parameters())
        readers_names["wrapped"].close()
        streamed, plain = readers_names["streamed"].grads, readers_names["result"].grads
        assert all(torch.isfinite(each).all() for each in streamed.values()) and streamed.keys() == plain.keys()


def commands() -> list[tuple[str, list[str]]]:
    """(page, words behind `leapalign`) of code that begins with it: lines of fenced blocks, and spans within a line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        inline = re.findall(r"`(leapalign [a-z][^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        lines = [line.strip() for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        for line in (*inline, *lines):
            if line.startswith("leapalign "):
                found.append((page.name, shlex.split(line, comments=True)[1:]))
    return found


def test_every_command_of_ours_is_accepted() -> None:
    """By the parser and the config; the files that they name are the reader's."""
    known = _commands()
    parser = _parser(known)
    assert {"doctor", "plan", "align"} <= {words[0] for _, words in commands()}
    for page, (name, *rest) in commands():
        assert name in known, f"{page}: leapalign {name}"
        if "--help" in rest:
            continue
        others, overrides = split_overrides(rest, reserved=[*known[name].OPTIONS])
        options = parser.parse_args([name, *others])
        if known[name].TAKES_CONFIG and options.config:
            config = "shapes" if options.config.endswith(".yaml") else options.config
            load_config(config, [*overrides, "--train_prompts=a.txt"])


def test_every_benchmark_exists() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"python -m bench ([a-z][\w-]*)", text))
    assert named and named <= BENCH.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_messages_in_troubleshooting_are_the_programs() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    code = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text(encoding="utf-8"))
        for folder in ("leapalign", "engine", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    )
    messages = [
        message for line in re.findall(r"^## (.+)$", text, re.MULTILINE) for message in re.findall(r"`(.+?)`", line)
    ]
    assert len(messages) > 8
    for message in messages:
        assert message in code, message


def test_public_names_are_there_and_lazy() -> None:
    wanted = {
        "alignment_gradients", "LeapAlign", "StreamedModel", "SequentialBackbone", "AdamW8bit", "plan_memory", "Budget",
        "Workload",
    }  # fmt: skip
    assert wanted <= set(leapalign.__all__) and wanted <= set(dir(leapalign))
    assert all(getattr(leapalign, name).__name__ == name for name in wanted)
    code = "import sys, leapalign; leapalign.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bench_lists_its_groups() -> None:
    from bench.__main__ import GROUPS, main

    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main([]) == 2
    assert all(name in told.getvalue() for group, names in GROUPS.items() for name in (group, *names))
