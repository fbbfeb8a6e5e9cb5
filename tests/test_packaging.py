"""What a wheel and a source archive hold: each file once, under `leapalign` only, with the data the package needs."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]["packages"]


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a wheel (without the native module, which needs a compiler) or an sdist of `source` into `folder`."""
    call = {
        "wheel": f"build_wheel({str(folder)!r}, {{'wheel.cmake': 'false'}})",
        "sdist": f"build_sdist({str(folder)!r})",
    }
    subprocess.run(
        [sys.executable, "-c", f"from scikit_build_core.build import *; {call[kind]}"],
        cwd=source,
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    (built,) = folder.iterdir()
    return built


def wheel_names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def expected_names() -> list[str]:
    """Every file of the three layers under its installed name; caches, built modules and C++ sources stay behind."""
    names = []
    for target, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            linked = any(parent.is_symlink() for parent in (path, *path.parents) if parent.is_relative_to(ROOT))
            if path.is_file() and not linked and "__pycache__" not in inside.parts and path.suffix != ".so":
                names.append(f"{target}/{inside.as_posix()}")
    return sorted(name for name in names if "/csrc/" not in name)


def test_the_wheel_holds_every_file_once(wheel: Path) -> None:
    names = wheel_names(wheel)
    assert len(names) == len(set(names))
    assert sorted(name for name in names if ".dist-info/" not in name) == expected_names()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"leapalign"}


def test_the_wheel_holds_the_data(wheel: Path) -> None:
    names = wheel_names(wheel)
    assert "leapalign/py.typed" in names
    assert "leapalign/config/presets/shapes.yaml" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "CMakeLists.txt").is_file()
    assert (source / "kernels" / "host" / "csrc" / "host.cpp").is_file()
    assert not (source / "leapalign" / "engine").exists()
    assert not (source / "leapalign" / "kernels").exists()
    assert sorted(wheel_names(build("wheel", source, tmp_path / "wheel"))) == sorted(wheel_names(wheel))
