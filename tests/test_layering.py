"""Who may import whom: leapalign -> engine -> kernels, and no name of ours in the way of anyone else's."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"engine": "leapalign.engine", "kernels": "leapalign.kernels", "leapalign": "leapalign"}
TEXT = {".cfg", ".cpp", ".h", ".ini", ".jsonl", ".md", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml", ".yml"}


def tracked_files() -> list[Path]:
    """The repository's files: what git tracks or would track, or all but hidden folders where there is no git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        files = [path for path in ROOT.rglob("*") if not any(part[0] == "." for part in path.relative_to(ROOT).parts)]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def sources(folder: str) -> list[Path]:
    """Python files of a layer, by their real place: leapalign/engine and leapalign/kernels are links."""
    skipped = {ROOT / "leapalign" / "engine", ROOT / "leapalign" / "kernels"}
    return [path for path in sorted((ROOT / folder).rglob("*.py*")) if not skipped & set(path.parents)]


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([LAYERS[folder], *rest]).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import in a file, those inside functions and TYPE_CHECKING blocks included."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def breaches(folder: str, allowed: tuple[str, ...]) -> list[str]:
    """Imports of the repository's own code from outside the allowed packages."""
    own = ("leapalign", "engine", "kernels", "bench", "tests")
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(folder)
        if path.suffix in {".py", ".pyi"}
        for line, name in imports(path)
        if any(is_within(name, package) for package in own) and not any(is_within(name, package) for package in allowed)
    ]


def test_the_layers_are_there() -> None:
    for folder in LAYERS:
        assert sources(folder), f"{folder}/ holds no Python: the tests below would pass on nothing"


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("kernels", ("leapalign.kernels",)),
        ("engine", ("leapalign.engine", "leapalign.kernels")),
        ("leapalign", ("leapalign",)),
    ],
)
def test_imports_go_one_way(folder: str, allowed: tuple[str, ...]) -> None:
    assert not breaches(folder, allowed)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import engine.store", ["engine.store"]),
        ("from leapalign import rollout", ["leapalign.method.trajectory"]),
        ("from .. import rollout", ["leapalign.method.trajectory"]),
        ("from ..engine.vjp import f", ["leapalign.engine.passes.vjp.f"]),
        ("def f():\n    from leapalign.engine import vjp", ["leapalign.engine.passes.vjp"]),
    ],
)
def test_every_form_of_import_is_seen(
    source: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    path = tmp_path / "kernels" / "sample.py"
    path.write_text(source)
    assert [name for _, name in imports(path)] == names
    assert len(breaches("kernels", ("leapalign.kernels",))) == len(names)


def test_engine_and_kernels_are_namespaces() -> None:
    """With kernels/__init__.py a checkout on sys.path would be Hugging Face's `kernels` to transformers."""
    for folder in ("engine", "kernels", "bench"):
        assert not (ROOT / folder / "__init__.py").exists()
    for name in ("engine", "kernels"):
        link = ROOT / "leapalign" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"


def test_only_leapalign_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert all(is_within(name.replace("/", "."), "leapalign") for name in settings["wheel"]["packages"])
    ours = {name for name, owners in importlib.metadata.packages_distributions().items() if "leapalign" in owners}
    assert not ours & {"engine", "kernels", "bench", "tests"}


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_transformers_is_unharmed(place: str, tmp_path: Path) -> None:
    """`python -c` puts its folder first on sys.path: in the checkout that is where kernels/ lies."""
    code = (
        "import transformers; transformers.CLIPModel, transformers.T5EncoderModel; import leapalign.kernels.host.native"
    )
    environment_path = [str(ROOT)] if place == "elsewhere" else []
    code = f"import sys; sys.path += {environment_path!r}; {code}"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT if place == "checkout" else tmp_path,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stderr


def test_no_absolute_paths() -> None:
    """A path that exists on one machine only has no place in the repository."""
    absolute = re.compile(r"(?<![\w.~:/$}\])-])(?:/(?:home|root|Users|work|tmp|mnt|opt|data|var)/\w|\b[A-Z]:\\\\?\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked_files()
        if path.suffix in TEXT or path.name in {"Makefile", "run"}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if absolute.search(line)
    ]
    assert not found


def test_the_search_for_absolute_paths_finds_them() -> None:
    """Guards the pattern above against itself: it must see a path in the ways that they are written."""
    source = Path(__file__).read_text(encoding="utf-8")
    pattern = re.search(r're\.compile\(r"(.+)"\)', source)
    assert pattern
    absolute = re.compile(pattern[1])
    folder = "/" + "home"
    for line in (f'"{folder}/a"', f"cd {folder}/a", f"path={folder}/a", f"({folder}/a)"):
        assert absolute.search(line), line
    for line in ("https://example.org" + folder + "/a", "docs" + folder + "/a", "#!/usr/bin/env python"):
        assert not absolute.search(line), line
