"""The command `leapalign`: align, plan, sample, evaluate, embed, doctor.

Arguments, files and the output folder are checked before torch is loaded, so that a mistake is answered at once.
Exit codes: 0 done; 2 a mistake in settings or input, told in one line; 3 interrupted, can be resumed; 1 anything else.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from leapalign import __version__
from leapalign.config.keys import SECTIONS, kind
from leapalign.config.loading import (
    PRESETS,
    AlignConfig,
    check_output_dir,
    load_config,
    nearest,
    preset_names,
    split_overrides,
)
from leapalign.data.prompts import load_prompts
from leapalign.errors import UsageError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 3
MOST_SECONDS = 60  # of a measurement of `doctor`: beyond, nothing is more certain


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
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return USAGE
    command, rest = words[0], words[1:]
    if command in ("-h", "--help", "--version"):
        parser.parse_args([command])
    if command.startswith("-"):
        raise UsageError(f"'{command}' stands before the command; write leapalign COMMAND CONFIG {command}")
    if command not in _COMMANDS:
        raise UsageError(
            f"unknown command '{command}'; the nearest is '{nearest(command, _COMMANDS)}' ({', '.join(_COMMANDS)})"
        )
    if not _COMMANDS[command].takes_config:
        return _COMMANDS[command].run(parser.parse_args([command, *rest]))
    others, overrides = split_overrides(rest, reserved=["help", *_COMMANDS[command].options])
    options = parser.parse_args([command, *others])
    if options.config is None:
        raise UsageError(f"{command} needs a CONFIG: a preset ({', '.join(preset_names())}) or a YAML file")
    return _COMMANDS[command].run(options, load_config(options.config, overrides))


def _align(_: argparse.Namespace, config: AlignConfig) -> int:
    checkpoint = check_output_dir(config)
    load_prompts(config.train_prompts, key="train_prompts")
    if config.validation_prompts is not None:
        load_prompts(config.validation_prompts, key="validation_prompts")
    _load_libraries(config)
    if config.resume_from_checkpoint:
        start = f"going on from {checkpoint}" if checkpoint else "its run has no checkpoint yet; starting at step 0"
        print(f"leapalign: {config.output_dir}: {start}", file=sys.stderr)
    from leapalign.run.trainer import Trainer

    outcome = Trainer(config).run()
    print(outcome.summary)
    if not outcome.interrupted:
        return DONE
    print(f"leapalign: interrupted; go on with:\n  {outcome.resume_command}", file=sys.stderr)
    return INTERRUPTED


def _plan(options: argparse.Namespace, config: AlignConfig) -> int:
    _quiet()
    from leapalign.commands.plan import plan_command
    from leapalign.engine.planning.workload import Machine

    result = plan_command(config, Machine.read(options.machine) if options.machine else Machine())
    text = result.pop("table")
    print(json.dumps(result, indent=2) if options.json else text)
    return DONE


def _sample(options: argparse.Namespace, config: AlignConfig) -> int:
    if not options.prompt:
        raise UsageError("sample needs a prompt: --prompt TEXT, repeated for more")
    prompts = [prompt.text for prompt in load_prompts(options.prompt, key="--prompt")]
    output = Path(options.output)
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output '{output}' must end in .png")
    if not output.parent.is_dir():
        raise UsageError(f"--output '{output}': folder '{output.parent}' does not exist")
    if options.num_images < 1:
        raise UsageError(f"--num_images {options.num_images}: give 1 or more")
    transformer = _transformer_folder(options.transformer)
    _load_libraries(config)
    from leapalign.evaluation.sampling import sample_command

    print(sample_command(config, transformer, prompts, output, num_images=options.num_images))
    return DONE


def _evaluate(options: argparse.Namespace, config: AlignConfig) -> int:
    if options.prompts is None:
        prompts = load_prompts(config.validation_prompts, key="validation_prompts")
    else:
        prompts = load_prompts(options.prompts, key="--prompts")
    transformer = _transformer_folder(options.transformer)
    _load_libraries(config)
    from leapalign.evaluation.scores import evaluate_command

    result = evaluate_command(config, transformer, prompts)
    table = result.pop("table")
    print(json.dumps(result, indent=2) if options.json else table)
    return DONE


def _embed(_: argparse.Namespace, config: AlignConfig) -> int:
    prompts = load_prompts(config.train_prompts, key="train_prompts")
    if config.validation_prompts is not None:
        prompts += load_prompts(config.validation_prompts, key="validation_prompts")
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    _load_libraries(config)
    from leapalign.evaluation.sampling import prompt_store

    store = prompt_store(config, texts)
    print(f"{len(texts)} prompts: {store.encoded} encoded now, {len(texts) - store.encoded} cached; {store.folder}")
    return DONE


def _doctor(options: argparse.Namespace) -> int:
    seconds, output = options.seconds, options.output and Path(options.output)
    if not 0 < seconds <= MOST_SECONDS:  # nan is neither
        raise UsageError(f"--seconds {seconds}: give more than 0 and at most {MOST_SECONDS}")
    if output and (output.suffix != ".json" or not output.parent.is_dir()):
        raise UsageError(f"--output '{output}': give a file NAME.json in a folder that exists")
    _quiet()
    print("leapalign: measuring this machine and planning every preset for it", file=sys.stderr)
    from leapalign.doctor.examination import doctor_command

    result = doctor_command(seconds)
    table, text = result.pop("table"), json.dumps(result, indent=2)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
    print(text if options.json else table)
    return DONE


@dataclass(frozen=True)
class _Command:
    """A command: its function, what it does, and its own options.

    With a config every other option is one of the config's keys, and the function is given both.
    """

    run: Callable[..., int]
    text: str
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    takes_config: bool = True


_TRANSFORMER: dict[str, Any] = {
    "metavar": "DIR",
    "help": "aligned transformer: a transformer/ folder, a run or a checkpoint (default: the pipeline's own)",
}
_COMMANDS = {
    "align": _Command(_align, "align all parameters of a pipeline's transformer with a reward"),
    "plan": _Command(
        _plan,
        "say what a run would hold, move and take, phase by phase, within --vram and --ram (default: no limit), "
        "from the shapes of its models alone",
        {
            "machine": {
                "metavar": "FILE",
                "help": "rates of the machine: what `leapalign doctor --output FILE` wrote, or JSON with flops_per_s, "
                "h2d_bytes_per_s and so on (default: an RTX 4090 on PCIe 4.0 x16)",
            },
            "json": {"action": "store_true", "help": "print JSON instead of a table"},
        },
    ),
    "sample": _Command(
        _sample,
        "draw pictures for prompts into one PNG, a row for each prompt",
        {
            "prompt": {
                "metavar": "TEXT",
                "action": "append",
                "help": "a prompt; repeat for more",
            },
            "transformer": _TRANSFORMER,
            "output": {"metavar": "FILE", "default": "sample.png", "help": "PNG to write (default: %(default)s)"},
            "num_images": {
                "metavar": "N",
                "type": int,
                "default": 4,
                "help": "pictures for each prompt (default: %(default)s)",
            },
        },
    ),
    "evaluate": _Command(
        _evaluate,
        "score a transformer on held-out prompts: reward, and accuracy where a checker knows the scene",
        {
            "transformer": _TRANSFORMER,
            "prompts": {
                "metavar": "SRC",
                "help": ".txt, .jsonl, shapes:validation or a data set id (default: validation_prompts)",
            },
            "json": {"action": "store_true", "help": "print JSON instead of a table"},
        },
    ),
    "embed": _Command(_embed, "compute and cache the prompt embeddings of a config, nothing else"),
    "doctor": _Command(
        _doctor,
        "measure this machine, say which presets fit and what will hurt",
        {
            "json": {"action": "store_true", "help": "print JSON instead of a table"},
            "output": {"metavar": "FILE", "help": "write the JSON there, too: `leapalign plan --machine` reads it"},
            "seconds": {
                "metavar": "S",
                "type": float,
                "default": 0.5,
                "help": "of each measurement (default: %(default)s)",
            },
        },
        takes_config=False,
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
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
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.text,
            description=f"{command.text[0].upper()}{command.text[1:]}.",
            usage=f"leapalign {name} CONFIG [--key value ...]" if command.takes_config else None,
            epilog="Every key that `leapalign align --help` lists can be given here too."
            if command.takes_config and name != "align"
            else None,
            allow_abbrev=False,
        )
        if command.takes_config:
            sub.add_argument("config", metavar="CONFIG", nargs="?", help="a preset's name or a YAML file")
        for option, details in command.options.items():
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


def _transformer_folder(name: str | None) -> Path | None:
    """`name`, or the transformer/ in it; None for the pipeline's own transformer."""
    if name is None:
        return None
    for folder in (Path(name), Path(name) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(f"--transformer '{name}' holds no transformer (config.json); name a run's transformer/ folder")


def _quiet() -> None:
    """No notices of transformers and diffusers; the environment's own TRANSFORMERS_VERBOSITY and the like win."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _load_libraries(config: AlignConfig) -> None:
    """Load torch, transformers and diffusers, without their notices and loading bars, and find model and device."""
    _quiet()
    # Torch reads this when it is loaded. Segments that grow leave no gaps between tensors of many sizes.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    from leapalign.families.pipeline import resolve_device, resolve_model

    resolve_model(config.pretrained_model_name_or_path)
    resolve_device(config.device)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _complain(message: str) -> None:
    print(f"leapalign: error: {' '.join(message.split())}", file=sys.stderr)
