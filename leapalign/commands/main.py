"""The command `leapalign`: align, plan, sample, evaluate, embed, doctor.

Arguments, files and the output folder are checked before torch is loaded, so that a mistake is answered at once.
Exit codes: 0 done; 2 a mistake in settings or input, told in one line; 3 interrupted, can be resumed; 1 anything else.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from leapalign import __version__, extensions
from leapalign.commands import COMMANDS
from leapalign.commands.codes import DONE, FAILED, USAGE
from leapalign.config.keys import SECTIONS, kind
from leapalign.config.loading import (
    PRESETS,
    load_config,
    nearest,
    preset_names,
    split_overrides,
)
from leapalign.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; None: sys.argv) and return the exit code.

    Mistakes are printed as one line on stderr. LEAPALIGN_TRACEBACK=1 shows where they were raised instead.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as stop:  # argparse after --help and --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, OSError) as error:
        if os.environ.get("LEAPALIGN_TRACEBACK"):
            raise
        _complain(str(error))
        return USAGE if isinstance(error, ValueError | FileNotFoundError) else FAILED
    except KeyboardInterrupt:
        _complain("stopped; checkpoints already written stay valid")
        return FAILED
    except MemoryError as error:
        _complain(f"out of host memory: {error}; lower --train_batch_size or --resolution, or end other programs")
        return FAILED
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _complain(
            f"out of device memory: {error}; lower --vram, --train_batch_size or --resolution, or use a card with more "
            "memory"
        )
        return FAILED


def _run(words: list[str]) -> int:
    commands = _commands()
    parser = _parser(commands)
    if not words:
        parser.print_help(sys.stderr)
        return USAGE
    command, rest = words[0], words[1:]
    if command in ("-h", "--help", "--version"):
        parser.parse_args([command])
    if command.startswith("-"):
        raise UsageError(f"'{command}' stands before the command; write leapalign COMMAND CONFIG {command}")
    if command not in commands:
        raise UsageError(
            f"unknown command '{command}'; the nearest is '{nearest(command, commands)}' ({', '.join(commands)})"
        )
    chosen = commands[command]
    if not chosen.TAKES_CONFIG:
        return chosen.run(parser.parse_args([command, *rest]))
    others, overrides = split_overrides(rest, reserved=["help", *chosen.OPTIONS])
    options = parser.parse_args([command, *others])
    if options.config is None:
        raise UsageError(f"{command} needs a CONFIG: a preset ({', '.join(preset_names())}) or a YAML file")
    return chosen.run(options, load_config(options.config, overrides))


class Command(Protocol):
    """A module in leapalign/commands/.

    Attributes:
        TEXT: what it does, for --help.
        OPTIONS: {option without dashes: arguments of argparse}; with a config every other option is one of its keys.
        TAKES_CONFIG: whether CONFIG follows, which `run` is then given after the options.
        run: checks arguments, does the work, prints; returns the exit code.
    """

    TEXT: str
    OPTIONS: dict[str, dict[str, Any]]
    TAKES_CONFIG: bool
    run: Callable[..., int]


def _commands() -> dict[str, Command]:
    """All commands by name, in the order of --help. Their modules load torch only when they run."""
    names = extensions.names("commands", COMMANDS)
    return {name: extensions.load("commands", COMMANDS, name, key="command") for name in names}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parser(known: Mapping[str, Command]) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    width = max(map(len, preset_names())) + 2
    presets = "\n".join(f"  {name:<{width}}{_first_comment(name)}" for name in preset_names())
    parser = _Parser(
        prog="leapalign",
        formatter_class=raw,
        allow_abbrev=False,
        description="Align all parameters of a flow transformer with a differentiable reward (LeapAlign).",
        epilog="CONFIG is a YAML file or one of the presets:\n"
        f"{presets}\n\nEvery key of a config can be overridden: leapalign align shapes --learning_rate 5e-5\n"
        "LEAPALIGN_TRACEBACK=1 in the environment shows where an error was raised.",
    )
    parser.add_argument("--version", action="version", version=f"leapalign {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in known.items():
        sub = commands.add_parser(
            name,
            help=command.TEXT,
            description=f"{command.TEXT[0].upper()}{command.TEXT[1:]}.",
            usage=f"leapalign {name} CONFIG [--key value ...]" if command.TAKES_CONFIG else None,
            epilog="Every key that `leapalign align --help` lists can be given here too."
            if command.TAKES_CONFIG and name != "align"
            else None,
            allow_abbrev=False,
        )
        if command.TAKES_CONFIG:
            sub.add_argument("config", metavar="CONFIG", nargs="?", help="a preset's name or a YAML file")
        for option, details in command.OPTIONS.items():
            sub.add_argument(f"--{option}", **details)
        if name == "align":
            _list_keys(sub)
    return parser


def _list_keys(parser: argparse.ArgumentParser) -> None:
    """Show every key in --help; their values are taken by `split_overrides` before argparse sees them."""
    for section in SECTIONS:
        group = parser.add_argument_group((section.__doc__ or "").strip())
        for key, info in section.model_fields.items():
            default = "required" if info.is_required() else f"default: {_shown(info.default)}"
            text = f"{info.description} ({default})".replace("%", "%%")
            group.add_argument(f"--{key}", metavar=kind(key), help=text, default=argparse.SUPPRESS)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _first_comment(preset: str) -> str:
    return (PRESETS / f"{preset}.yaml").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def _complain(message: str) -> None:
    print(f"leapalign: error: {' '.join(message.split())}", file=sys.stderr)
