"""Where the settings come from and go: presets, YAML files, overrides, `config.yaml`, and the output folder.

`AlignConfig` (the keys themselves) is in `leapalign.config.keys`. Every mistake is a one-line `UsageError`.
"""

import difflib
import functools
import json
import platform
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from leapalign.config.keys import AlignConfig, accepts
from leapalign.errors import UsageError

__all__ = [
    "AlignConfig",
    "check_output_dir",
    "load_config",
    "nearest",
    "preset_names",
    "save_config",
    "split_overrides",
]

PRESETS = Path(__file__).parent / "presets"
_SWITCH = {"true", "false", "yes", "no", "on", "off", "1", "0"}
_PACKAGES = (
    "leapalign",
    "torch",
    "diffusers",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "triton",
)


def preset_names() -> list[str]:
    """Names of the packaged presets, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def nearest(word: str, known: Iterable[str]) -> str:
    """The member of `known` most like `word`, or the one it abbreviates (lr: learning_rate); there always is one."""
    names = list(known)
    spelt_out = [name for name in names if word == "".join(part[:1] for part in name.split("_"))]
    return (spelt_out or difflib.get_close_matches(word, names, n=1, cutoff=0.0))[0]


def split_overrides(arguments: Sequence[str], reserved: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Separate ``--key value``, ``--key=value`` and bare ``--flag`` from other arguments.

    Args:
        arguments: command-line words.
        reserved: option names (without dashes) that belong to the caller; they stay among the others.

    Returns:
        (other words, overrides as ``--key=value``), both in their order. Dashes inside a key count as underscores.

    Raises:
        UsageError: an option that is neither a key nor reserved, or a key without its value.
    """
    keys, own = AlignConfig.model_fields, set(reserved)
    others: list[str] = []
    overrides: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        key = name.replace("-", "_")
        if not word.startswith("--"):
            others.append(word)
            continue
        if key in own:
            others.append(f"--{key}{equals}{value}")
            continue
        if key not in keys:
            raise UsageError(
                f"unknown key --{name}; the nearest is --{nearest(key, [*keys, *own])} "
                "(`leapalign align --help` lists all)"
            )
        if not equals:
            flag = keys[key].annotation is bool
            if words and not words[0].startswith("--") and (not flag or words[0].lower() in _SWITCH):
                value = words.pop(0)
            elif flag:
                value = "true"
            else:
                raise UsageError(f"--{key} needs a value: {accepts(key)}")
        overrides.append(f"--{key}={value}")
    return others, overrides


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> AlignConfig:
    """Settings from a preset or a YAML file, with command-line overrides on top.

    Args:
        name_or_path: a preset's name (`preset_names`) or the path of a YAML file with flat keys.
        overrides: words such as ``["--learning_rate", "1e-4", "--seed=3", "--gradient_checkpointing"]``;
            ``null`` unsets a key that may be unset, ``[a, b]`` is a list.

    Raises:
        UsageError: one line that names the key, the value, where it was set and what is accepted.
    """
    path = _config_path(str(name_or_path))
    values = _read_yaml(path)
    for key in values:
        if key not in AlignConfig.model_fields:
            raise UsageError(
                f"unknown key '{key}' in {path}; the nearest is '{nearest(str(key), AlignConfig.model_fields)}'"
            )
    others, flags = split_overrides(overrides)
    if others:
        raise UsageError(f"unexpected argument '{others[0]}'; settings are given as --key value")
    origin = dict.fromkeys(values, f"in {path}")
    for flag in flags:
        key, _, text = flag.removeprefix("--").partition("=")
        values[key], origin[key] = _override(key, text), "on the command line"
    try:
        return AlignConfig(**values)
    except ValidationError as error:
        raise UsageError(_one_line(error, origin, path)) from None


def save_config(config: AlignConfig, folder: str | Path) -> None:
    """Write ``config.yaml`` (the resolved settings) and ``versions.json`` (python and packages) into `folder`.

    ``resume_from_checkpoint`` is left out: config.yaml says what the run is, not how it was last started, so
    ``leapalign align FOLDER/config.yaml --resume_from_checkpoint latest`` goes on with it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.model_dump(mode="json", exclude={"resume_from_checkpoint"})
    plain = json.dumps(settings, ensure_ascii=False).isprintable()  # PyYAML escapes U+0085 and its like only in ASCII
    text = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=plain)
    (folder / "config.yaml").write_text(f"# Resolved settings of this run.\n{text}", encoding="utf-8")
    (folder / "versions.json").write_text(json.dumps(_versions(), indent=2) + "\n", encoding="utf-8")


def check_output_dir(config: AlignConfig) -> Path | None:
    """The checkpoint that the run starts from, or None for a start at step 0; call it before anything is written.

    A folder that holds a run (config.yaml, metrics.jsonl or a checkpoint) is only taken with
    ``resume_from_checkpoint``. ``latest`` needs a run to go on with; a run that was stopped before its first
    checkpoint starts again at step 0. A checkpoint may be named by its path or by its name in `output_dir`; one of
    another run starts a new folder from that point.

    Raises:
        UsageError: the folder is a file, holds a run, or has no such checkpoint.
    """
    folder, wanted = Path(config.output_dir), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir = '{folder}' is a file; name a folder")
    own = sorted(_checkpoints(folder), key=_step)
    holds_run = bool(own) or any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl"))
    if wanted is None:
        if holds_run:
            raise UsageError(
                f"output_dir = '{folder}' already holds a run; "
                "go on with it by --resume_from_checkpoint latest, or name another --output_dir"
            )
        return None
    if wanted == "latest":
        if not holds_run:
            raise UsageError(
                f"resume_from_checkpoint = latest, but output_dir = '{folder}' holds no run and no checkpoint; "
                "correct --output_dir, or leave out --resume_from_checkpoint to start a run"
            )
        return own[-1] if own else None
    for checkpoint in (Path(wanted), folder / wanted):
        if (checkpoint / "trainer_state.json").is_file():
            if holds_run and checkpoint.resolve().parent != folder.resolve():
                raise UsageError(
                    f"resume_from_checkpoint = '{wanted}' belongs to another run than the one in "
                    f"output_dir = '{folder}'; name another --output_dir"
                )
            return checkpoint
    have = "the folder has " + ", ".join(path.name for path in own) if own else "the folder has no checkpoint"
    raise UsageError(f"resume_from_checkpoint = '{wanted}' is no checkpoint in output_dir = '{folder}'; {have}")


@functools.cache
def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, as leapalign.engine.memory.checkpoint has them, without loading torch."""
    found = folder.glob("checkpoint-*")
    return [
        path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").is_file()
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `no` and `on` are text (mixed_precision: no), 1e-4 is a number; a key twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is set twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would take for something else than text."""


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_FLOATS = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in (_BOOL, _FLOAT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, _FLOATS, list("-+0123456789."))
_Dumper.add_implicit_resolver(_FLOAT, _FLOATS, list("-+0123456789."))


def _config_path(name: str) -> Path:
    preset = PRESETS / f"{name}.yaml"
    if "/" not in name and preset.is_file():
        return preset
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UsageError(f"CONFIG '{name}' is a folder; name the YAML file, e.g. {path / 'config.yaml'}")
    presets = preset_names()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UsageError(f"config file '{name}' does not exist; name a YAML file or a preset ({', '.join(presets)})")
    raise UsageError(
        f"CONFIG '{name}' is neither a preset ({', '.join(presets)}) nor a file; "
        f"the nearest preset is '{nearest(name, presets)}'"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError:
        raise UsageError(f"config file '{path}' is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"config file '{path}'{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"config file '{path}' is not YAML: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"config file '{path}' holds {type(values).__name__}, not lines of 'key: value'")
    return values or {}


def _override(key: str, text: str) -> Any:
    """The value of one ``--key=text``: pydantic converts text to numbers, here are null and lists."""
    if text in ("null", "none", "None") and " or null" in accepts(key):
        return None
    if text.startswith("[") and "list" in accepts(key):
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UsageError(f"--{key} {text}: not a list; write [a, b]") from None
    return text


def _one_line(error: ValidationError, origin: Mapping[str, str], path: Path) -> str:
    """The first mistake in one line, and how many more there are."""
    mistakes = error.errors()
    first = mistakes[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        line = f"{key} is not set; set it in {path} or with --{key}"
    elif first["type"] == "value_error":
        line = str(first["ctx"]["error"])
    else:
        line = f"{key} = {reprlib.repr(first['input'])}: expected {accepts(key)}"
    if key in origin:
        line += f" (set {origin[key]})"
    return line if len(mistakes) == 1 else f"{line}; and {len(mistakes) - 1} more"
