"""Who may import whom: leapalign -> engine -> kernels, and no name of ours in the way of anyone else's."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = {"engine": "leapalign.engine", "kernels": "leapalign.kernels", "leapalign": "leapalign"}
CODE = {".cpp", ".h", ".py", ".pyi"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
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


def imports(path: Path, module: str | None = None) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import in a file, those inside functions and TYPE_CHECKING blocks included."""
    module = module or module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
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
        ("from leapalign import rollout", ["leapalign.rollout"]),
        ("from .. import rollout", ["leapalign.rollout"]),
        ("from ..engine.vjp import f", ["leapalign.engine.vjp.f"]),
        ("def f():\n    from leapalign.engine import vjp", ["leapalign.engine.vjp"]),
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


# ---- rooms ---------------------------------------------------------------------------------------------------------

MOST_FILES = 14  # in a folder
MOST_LINES = 450  # in a file
FOLDERS = (*LAYERS, "bench")


def modules() -> dict[str, Path]:
    """{dotted name: file} of all code that is not a test."""
    found = {module_name(path): path for folder in LAYERS for path in sources(folder) if path.suffix == ".py"}
    bench = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "bench").rglob("*.py")}
    return found | bench


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """{module: modules that it imports, anywhere in its file, for types only too}."""
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        graph[name] = set()
        for _, target in imports(path, name):
            known = target if target in files else target.rpartition(".")[0]
            if known in files and known != name:
                graph[name].add(known)
    return graph


def circles(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, ...]]:
    """The circle that graphlib finds first, as one item; empty without any."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [tuple(error.args[1])]
    return []


def room(name: str, path: Path) -> str:
    """The folder of a module below its layer; a file directly in the layer is a room of its own."""
    folder, *inner = path.relative_to(ROOT).parts
    return f"{folder}/{inner[0]}"


def test_no_file_imports_in_a_circle() -> None:
    assert not circles(import_graph(modules()))


def test_no_room_imports_in_a_circle() -> None:
    """kernels, engine, leapalign and bench: what a folder needs lies below it, and what needs it above."""
    files = modules()
    rooms: dict[str, set[str]] = {}
    for name, targets in import_graph(files).items():
        here = room(name, files[name])
        rooms.setdefault(here, set()).update(
            room(each, files[each]) for each in targets if room(each, files[each]) != here
        )
    assert len(rooms) > 20, "the rooms were not found"
    assert not circles(rooms)


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_folder_is_crowded() -> None:
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in tracked_files() if path.suffix in CODE)
    assert not {folder: count for folder, count in folders.items() if count > MOST_FILES}


def test_no_file_is_long() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in tracked_files()
        if path.suffix in CODE
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_every_room_says_what_lives_there() -> None:
    """The __init__ of a package begins with a sentence, and bench/README.md has a line for each of its folders."""
    packages = {path.parent for path in modules().values()} - {ROOT / name for name in FOLDERS}
    for folder in sorted(packages):
        if folder.is_relative_to(ROOT / "bench"):
            assert f"`{folder.relative_to(ROOT / 'bench').as_posix()}/`" in (ROOT / "bench" / "README.md").read_text()
        else:
            assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))), folder


def test_a_family_is_named_in_its_own_room_alone() -> None:
    """No diffusers class of a model family outside leapalign/families, engine/backbones and messages about them."""
    named = r"\b(?:Flux|SD3|StableDiffusion3)\w*(?:Pipeline|Transformer2DModel)\b"
    found = []
    for path in sources("leapalign"):
        inner = path.relative_to(ROOT / "leapalign").parts[0]
        if path.suffix != ".py" or inner in ("families", "zoo"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=text) | ast.Attribute(attr=text) | ast.Constant(value=text) | ast.alias(name=text):
                    pass
                case _:
                    continue
            if isinstance(text, str) and text not in docs and re.search(named, text):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert not found


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
