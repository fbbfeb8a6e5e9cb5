"""The command line: what reaches each command, exit codes, and one line on stderr for every mistake."""

import json
import subprocess
import sys
import types

import pytest
import yaml

from leapalign.commands.codes import DONE, FAILED, INTERRUPTED, USAGE
from leapalign.commands.main import main
from leapalign.config.keys import AlignConfig


@pytest.fixture
def run(tmp_path):
    """A folder with a config, prompts and something that looks like a pipeline; gives the config's path as text."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    settings = {
        "pretrained_model_name_or_path": str(model),
        "train_prompts": str(tmp_path / "prompts.txt"),
        "validation_prompts": ["a red square"],
        "output_dir": str(tmp_path / "out"),
        "reward": "shapes",
        "resolution": 32,
        "device": "cpu",
    }
    config = tmp_path / "my.yaml"
    config.write_text(yaml.safe_dump(settings))
    return str(config)


@pytest.fixture
def trainer(monkeypatch):
    """Replaces the trainer; gives the configs it was built with and the outcome it will return."""
    outcome = types.SimpleNamespace(interrupted=False, resume_command="leapalign align R", summary="reward 0.1 -> 0.2")
    module = types.ModuleType("leapalign.run.trainer")
    configs = []

    class Trainer:
        def __init__(self, config):
            configs.append(config)

        def run(self):
            if isinstance(outcome.summary, BaseException):
                raise outcome.summary
            return outcome

    vars(module)["Trainer"] = Trainer
    monkeypatch.setitem(sys.modules, "leapalign.run.trainer", module)
    return types.SimpleNamespace(configs=configs, outcome=outcome)


def error_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("leapalign: error: ")
    assert err.count("\n") == 1
    return err


# ---- align ---------------------------------------------------------------------------------------------------------


def test_align_hands_the_resolved_config_to_the_trainer(run, trainer, capsys):
    assert main(["align", "--max_train_steps", "3", run, "--learning_rate=1e-4", "--use_ema", "false"]) == DONE
    (config,) = trainer.configs
    assert (config.max_train_steps, config.learning_rate, config.use_ema) == (3, 1e-4, False)
    assert capsys.readouterr().out == "reward 0.1 -> 0.2\n"


def test_an_interrupted_run_says_how_to_go_on(run, trainer, capsys):
    trainer.outcome.interrupted = True
    assert main(["align", run]) == INTERRUPTED
    assert capsys.readouterr().err.endswith("go on with:\n  leapalign align R\n")


def test_resume_without_a_checkpoint_starts_over_with_a_notice(run, trainer, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("")
    assert main(["align", run, "--resume_from_checkpoint", "latest"]) == DONE
    assert "its run has no checkpoint yet; starting at step 0" in capsys.readouterr().err


def test_resume_names_the_checkpoint(run, trainer, tmp_path, capsys):
    checkpoint = tmp_path / "out" / "checkpoint-000050"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    assert main(["align", run, "--resume_from_checkpoint", "latest"]) == DONE
    assert f"going on from {checkpoint}" in capsys.readouterr().err


def test_out_of_memory_names_the_settings_to_change(run, trainer, capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    trainer.outcome.summary = OutOfMemoryError("tried to allocate 24 GiB.\nGPU 0 has 80 GiB")
    assert main(["align", run]) == FAILED
    line = error_line(capsys)
    assert "tried to allocate 24 GiB" in line
    assert "--vram" in line
    assert "--train_batch_size" in line


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ValueError("pairs must fall"), USAGE),
        (FileNotFoundError(2, "No such file", "x"), USAGE),
        (OSError(28, "No space left on device"), FAILED),
        (KeyboardInterrupt(), FAILED),
    ],
)
def test_errors_in_the_run_are_one_line_too(run, trainer, capsys, raised, code):
    trainer.outcome.summary = raised
    assert main(["align", run]) == code
    error_line(capsys)


def test_a_bug_keeps_its_traceback(run, trainer):
    trainer.outcome.summary = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["align", run])


def test_the_environment_can_ask_for_the_traceback(run, trainer, monkeypatch):
    monkeypatch.setenv("LEAPALIGN_TRACEBACK", "1")
    trainer.outcome.summary = ValueError("pairs must fall")
    with pytest.raises(ValueError, match="pairs must fall"):
        main(["align", run])


# ---- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES = [
    ("algin CONFIG", ["unknown command 'algin'", "nearest is 'align'"]),
    ("--seed 3 align CONFIG", ["'--seed' stands before the command"]),
    ("align", ["align needs a CONFIG: a preset (flux1_dev, ", ", shapes) or a YAML file"]),
    ("align CONFIG extra", ["unrecognized arguments: extra"]),
    ("align none.yaml", ["config file 'none.yaml' does not exist"]),
    ("align shaeps", ["nearest preset is 'shapes'"]),
    ("align CONFIG --lerning_rate 1e-4", ["unknown key --lerning_rate", "--learning_rate"]),
    ("align CONFIG --learning_rate fast", ["learning_rate = 'fast'", "a number above 0"]),
    ("align CONFIG --learning_rate", ["--learning_rate needs a value"]),
    ("align CONFIG --resolution 500", ["resolution = 500", "divisible by 16", "496 or 512"]),
    ("align CONFIG --num_inference_steps 1", ["num_inference_steps = 1", "2 or more"]),
    ("align CONFIG --train_prompts none.txt", ["train_prompts: file 'none.txt' does not exist"]),
    ("align CONFIG --train_prompts FOLDER/empty.txt", ["train_prompts: ", "empty.txt' has no prompts"]),
    ("align CONFIG --train_prompts null", ["train_prompts is not set"]),
    ("align CONFIG --validation_prompts none.jsonl", ["validation_prompts: file 'none.jsonl' does not exist"]),
    ("align CONFIG --pretrained_model_name_or_path ./none", ["pretrained_model_name_or_path = './none'"]),
    ("align CONFIG --pretrained_model_name_or_path FOLDER", ["has no model_index.json"]),
    ("align CONFIG --device cuda:99", ["device = cuda:99"]),
    ("align CONFIG --output_dir FOLDER/old", ["already holds a run", "--resume_from_checkpoint latest"]),
    ("align CONFIG --resume_from_checkpoint latest", ["holds no run and no checkpoint"]),
    ("align CONFIG --resume_from_checkpoint checkpoint-000010", ["'checkpoint-000010' is no checkpoint in"]),
    ("align flux1_dev", ["train_prompts is not set"]),
    ("sample CONFIG", ["sample needs a prompt: --prompt TEXT"]),
    ("sample CONFIG --promt x", ["unknown key --promt", "--prompt"]),
    ("sample CONFIG --prompt", ["--prompt: expected one argument"]),
    ("sample CONFIG --prompt x --num_images many", ["--num_images", "many"]),
    ("sample CONFIG --prompt x --num_images 0", ["--num_images 0: give 1 or more"]),
    ("sample CONFIG --prompt x --output x.jpg", ["--output 'x.jpg' must end in .png"]),
    ("sample CONFIG --prompt x --output none/x.png", ["folder 'none' does not exist"]),
    ("sample CONFIG --prompt x --transformer none", ["--transformer 'none' holds no transformer"]),
    ("evaluate CONFIG --prompts none.txt", ["--prompts: file 'none.txt' does not exist"]),
    ("evaluate CONFIG --validation_prompts null", ["validation_prompts is not set"]),
    ("embed CONFIG --train_prompts none.txt", ["train_prompts: file 'none.txt' does not exist"]),
]


@pytest.fixture
def words(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    return lambda line: [word.replace("CONFIG", run).replace("FOLDER", str(tmp_path)) for word in line.split()]


def tree(folder):
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize(("line", "expected"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(words, line, expected, tmp_path, trainer, capsys):
    before = tree(tmp_path)
    assert main(words(line)) == USAGE
    message = error_line(capsys)
    for part in expected:
        assert part in message
    assert tree(tmp_path) == before
    assert trainer.configs == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("align CONFIG --lerning_rate 1e-4", "--learning_rate"),
        ("align CONFIG --output_dir FOLDER/old", "already holds a run"),
        ("align none.yaml", "does not exist"),
    ],
)
def test_a_mistake_in_a_process_of_its_own(words, line, expected, pytestconfig):
    command = [sys.executable, "-m", "leapalign", *words(line)]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("leapalign: error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_commands_and_presets(capsys):
    assert main(["--help"]) == DONE
    text = capsys.readouterr().out
    for word in ("align", "plan", "sample", "evaluate", "embed", "doctor", "flux1_dev", "shapes"):
        assert word in text


def test_align_help_lists_every_key_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # one line a key
    assert main(["align", "--help"]) == DONE
    text = capsys.readouterr().out
    for key, info in AlignConfig.model_fields.items():
        assert f"--{key} " in text
        assert info.description in text
    assert "(default: 1e-05)" in text
    assert "(required)" in text


@pytest.mark.parametrize("command", ["plan", "sample", "evaluate", "embed"])
def test_every_command_has_help(command, capsys):
    assert main([command, "-h"]) == DONE
    assert f"leapalign {command} CONFIG" in capsys.readouterr().out


def test_nothing_at_all_shows_the_help(capsys):
    assert main([]) == USAGE
    assert "usage: leapalign" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == DONE
    assert capsys.readouterr().out.startswith("leapalign ")


# ---- sample, evaluate, embed ---------------------------------------------------------------------------------------


def test_sample_hands_on_prompts_and_transformer(run, tmp_path, monkeypatch, capsys):
    calls = []

    def sample_command(*args, **keywords):
        calls.append((args, keywords))
        return "written"

    monkeypatch.setattr("leapalign.evaluation.sampling.sample_command", sample_command)
    (tmp_path / "done" / "transformer").mkdir(parents=True)
    (tmp_path / "done" / "transformer" / "config.json").write_text("{}")
    out = tmp_path / "x.png"
    line = [
        "sample",
        run,
        "--prompt",
        "a red circle",
        "--prompt",
        "--seed=5",
        "--num-images",
        "2",
        "--output",
        str(out),
    ]
    line[line.index("--seed=5")] = "a blue square"
    assert main([*line, "--seed=5", "--transformer", str(tmp_path / "done")]) == DONE
    ((config, transformer, prompts, output), named) = calls[0]
    assert config.seed == 5
    assert transformer == tmp_path / "done" / "transformer"
    assert prompts == ["a red circle", "a blue square"]
    assert output == out
    assert named == {"num_images": 2}
    assert capsys.readouterr().out == "written\n"


@pytest.fixture
def evaluated(monkeypatch):
    calls = []

    def evaluate_command(config, transformer, prompts):
        calls.append((config, transformer, prompts))
        return {"reward": {"mean": 0.5}, "table": "reward  0.5"}

    monkeypatch.setattr("leapalign.evaluation.scores.evaluate_command", evaluate_command)
    return calls


def test_evaluate_prints_the_table(run, evaluated, capsys):
    assert main(["evaluate", run]) == DONE
    assert capsys.readouterr().out == "reward  0.5\n"
    assert evaluated[0][1] is None
    assert [prompt.text for prompt in evaluated[0][2]] == ["a red square"]


def test_evaluate_prints_json_for_other_prompts(run, evaluated, tmp_path, capsys):
    assert main(["evaluate", run, "--json", "--prompts", str(tmp_path / "prompts.txt")]) == DONE
    assert json.loads(capsys.readouterr().out) == {"reward": {"mean": 0.5}}
    assert [prompt.text for prompt in evaluated[0][2]] == ["a red circle", "a blue square"]


def test_embed_takes_the_distinct_prompts_of_both_sources(run, monkeypatch, capsys):
    seen = []

    def prompt_store(config, prompts):
        seen.extend(prompts)
        return types.SimpleNamespace(encoded=1, folder="/cache")

    monkeypatch.setattr("leapalign.planning.configured.prompt_store", prompt_store)
    assert main(["embed", run, "--validation_prompts", "[a red circle, a red square]"]) == DONE
    assert seen == ["a red circle", "a blue square", "a red square"]
    assert capsys.readouterr().out == "3 prompts: 1 encoded now, 2 cached; /cache\n"


def test_sample_writes_a_sheet_of_the_packaged_pipeline(tmp_path, capsys):
    from PIL import Image, ImageChops

    def sheet(name, *prompts):
        flags = [word for prompt in prompts for word in ("--prompt", prompt)]
        sizes = ["--num_images", "3", "--validation_inference_steps", "2", "--device", "cpu"]
        places = ["--output", str(tmp_path / name), "--cache_dir", str(tmp_path / "cache")]
        assert main(["sample", "shapes", *flags, *sizes, *places]) == DONE
        return Image.open(tmp_path / name)

    two = sheet("two.png", "a red circle", "a blue square")
    assert two.text["prompt 2"] == "a blue square"
    assert "2 prompts x 3" in capsys.readouterr().out
    one = sheet("one.png", "a blue square")
    assert one.width == two.width
    below = two.crop((0, two.height - one.height, two.width, two.height))
    # Pictures do not depend on the other prompts; a product of another batch size may round a pixel to the next level.
    differences = ImageChops.difference(one.convert("RGB"), below.convert("RGB"))
    assert max(differences.tobytes()) <= 1
    assert not list(tmp_path.glob(".*"))


def test_embed_fills_the_cache_once(tmp_path, capsys):
    line = ["embed", "shapes", "--device", "cpu", "--cache_dir", str(tmp_path)]
    assert main(line) == DONE
    assert " 0 cached; " in capsys.readouterr().out
    assert main(line) == DONE
    assert ": 0 encoded now, " in capsys.readouterr().out
