"""Settings: presets, YAML, overrides, one-line errors, what is saved, and when an output folder may be used."""

import json
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from leapalign.config.keys import SECTIONS, accepts, kind
from leapalign.config.loading import (
    AlignConfig,
    check_output_dir,
    load_config,
    nearest,
    preset_names,
    save_config,
    split_overrides,
)
from leapalign.errors import UsageError

MINIMAL = "pretrained_model_name_or_path: shapes\n"


def config(**keys):
    return AlignConfig(**{"pretrained_model_name_or_path": "shapes", **keys})


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return write


def test_presets_load_and_carry_the_settings_they_are_named_for():
    planned = ["flux1_dev_12gb", "flux1_dev_24gb", "flux1_dev_48gb", "flux1_dev_8gb", "sd35_medium_16gb"]
    assert preset_names() == sorted(["flux1_dev", *planned, "shapes"])
    for name in planned:
        assert load_config(name).optimizer == "adamw8bit"
    assert load_config("shapes").pretrained_model_name_or_path == "shapes"
    paper = load_config("flux1_dev")
    assert paper.train_batch_size * paper.gradient_accumulation_steps == 64
    expected = {
        "learning_rate": 1e-5,
        "adam_weight_decay": 1e-4,
        "ema_decay": 0.995,
        "max_train_steps": 300,
        "num_inference_steps": 25,
        "validation_inference_steps": 50,
        "resolution": 720,
        "guidance_scale": 3.5,
        "reward": "pickscore",
        "threshold": 0.4,
        "alpha": 0.1,
        "tau": 0.1,
    }  # LeapAlign, arXiv 2604.15311, section 4, PickScore
    assert {key: getattr(paper, key) for key in expected} == expected


def test_every_key_is_described_and_in_one_section():
    keys = [key for section in SECTIONS for key in section.model_fields]
    assert keys == list(AlignConfig.model_fields)
    for key, field in AlignConfig.model_fields.items():
        assert field.description, key
        assert accepts(key)
        assert kind(key)


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        config().seed = 1


def test_overrides_win_over_the_file(yaml_file):
    path = yaml_file(MINIMAL + "seed: 3\nlearning_rate: 1e-4\n")
    assert load_config(path).seed == 3
    words = ["--seed", "4", "--learning-rate=2e-5", "--gradient_checkpointing", "--use_ema", "false"]
    changed = load_config(path, words)
    assert (changed.seed, changed.learning_rate) == (4, 2e-5)
    assert (changed.gradient_checkpointing, changed.use_ema) == (True, False)


def test_null_and_lists_on_the_command_line(yaml_file):
    path = yaml_file(MINIMAL + "train_prompts: a.txt\n")
    words = ["--train_prompts", "null", "--validation_prompts", "[a circle, a square]", "--report_to=tensorboard,wandb"]
    changed = load_config(path, words)
    assert changed.train_prompts is None
    assert changed.validation_prompts == ["a circle", "a square"]
    assert changed.report_to == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("0.0001", 1e-4), ("1E-04", 1e-4), ("2", 2.0)]
)
def test_yaml_numbers_with_exponents_are_numbers(yaml_file, text, value):
    assert load_config(yaml_file(MINIMAL + f"learning_rate: {text}\n")).learning_rate == value


def test_yaml_no_is_text(yaml_file):
    assert load_config(yaml_file(MINIMAL + "mixed_precision: no\n")).mixed_precision == "no"


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        config,
        seed=st.integers(0, 2**63),
        learning_rate=st.floats(1e-12, 1.0),
        threshold=st.floats(-1e3, 1e3),
        executor=st.just("autograd"),
        mixed_precision=st.sampled_from(["no", "bf16"]),
        train_prompts=st.none() | st.text(string.printable, min_size=1),
        validation_prompts=st.none() | st.lists(st.text(min_size=1)),
        use_ema=st.booleans(),
        microbatch=st.none() | st.integers(1, 4),
        run_name=st.sampled_from(["no", "1e-4", "null", "true", "007", "a: b", "~"]),
    )
)
def test_a_saved_config_loads_as_itself(tmp_path_factory, original):
    folder = tmp_path_factory.mktemp("run")
    save_config(original, folder)
    assert load_config(folder / "config.yaml") == original


def test_save_config_leaves_the_resume_key_out_and_notes_versions(tmp_path):
    save_config(config(resume_from_checkpoint="latest"), tmp_path / "run")
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert set(AlignConfig.model_fields) - set(saved) == {"resume_from_checkpoint"}
    versions = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert {"python", "torch", "diffusers", "transformers"} <= set(versions)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lerning_rate", "learning_rate"),
        ("lr", "learning_rate"),
        ("batch_size", "train_batch_size"),
        ("Seed", "seed"),
        ("max_steps", "max_train_steps"),
        ("ema", "use_ema"),
    ],
)
def test_nearest_key(word, expected):
    assert nearest(word, AlignConfig.model_fields) == expected


@settings(deadline=None)
@given(st.text())
def test_nearest_always_names_a_key(word):
    assert nearest(word, AlignConfig.model_fields) in AlignConfig.model_fields


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--lerning_rate", "1"], ["unknown key --lerning_rate", "--learning_rate"]),
        (["--learning_rate", "fast"], ["learning_rate = 'fast'", "a number above 0", "on the command line"]),
        (["--learning_rate", "-1e-5"], ["learning_rate = '-1e-5'", "a number above 0"]),
        (["--learning_rate", "nan"], ["learning_rate = 'nan'", "a number above 0"]),
        (["--learning_rate"], ["--learning_rate needs a value", "a number above 0"]),
        (["--learning_rate", "--seed", "1"], ["--learning_rate needs a value"]),
        (["--train_batch_size", "2.5"], ["train_batch_size = '2.5'", "a whole number above 0"]),
        (["--use_ema=maybe"], ["use_ema = 'maybe'", "true or false"]),
        (["--reward", "hps"], ["reward = 'hps'", "one of shapes, pickscore, clipscore"]),
        (["--device", "gpu"], ["device = 'gpu'", "one of auto, cpu, mps, cuda"]),
        (["--report_to", "[tensorboard"], ["--report_to", "write [a, b]"]),
        (["--alpha", "1.5"], ["alpha = '1.5'", "a number from 0 to 1"]),
        (["--ema_decay", "1"], ["ema_decay = '1'", "of at least 0 and below 1"]),
        (["--resolution", "500"], ["resolution = 500", "divisible by 16", "496 or 512"]),
        (["--resolution", "8"], ["resolution = 8", "use 16"]),
        (["--num_inference_steps", "1"], ["num_inference_steps = 1", "2 or more"]),
        (["--microbatch", "9"], ["microbatch = 9 exceeds train_batch_size = 4", "lower microbatch to 4"]),
        (["--lr_warmup_steps", "5"], ["lr_warmup_steps = 5", "constant_with_warmup"]),
        (["--reward=shapes", "--reward_model_name_or_path=x"], ["reward_model_name_or_path = 'x'", "reward = shapes"]),
        (["--executor", "stream"], ["executor = 'stream'", "one of autograd, streamed"]),
        (["--mixed_precision=bf16"], ["mixed_precision = bf16", "use executor autograd, or mixed_precision no"]),
        (["--device=mps"], ["device = mps", "use executor autograd, or cuda or cpu"]),
        (["--executor=autograd", "--streamed_mode=held"], ["streamed_mode = held has no effect", "executor streamed"]),
        (["--executor=autograd", "--vram=24GiB"], ["vram = 24GiB has no effect", "use executor streamed"]),
        (["--executor=autograd", "--ram=1"], ["ram = 1 has no effect", "leave ram out"]),
        (["--executor=autograd", "--kernels=triton"], ["kernels = triton has no effect", "leave kernels out"]),
        (["--kernels=cuda"], ["kernels = 'cuda'", "one of auto, triton, torch"]),
        (["--attention=sage"], ["attention = 'sage'", "one of auto, native, cudnn, flash, xformers"]),
        (["--vram", "lots"], ["vram = lots", "a size such as 24GiB", "on the command line"]),
        (["--ram", "0GiB"], ["ram = 0GiB", "a size such as 24GiB"]),
        (["--executor=autograd", "--optimizer=adamw8bit"], ["use executor streamed, or optimizer adamw"]),
        (["--weight_dtype", "bf16"], ["weight_dtype = bf16", "use optimizer adamw8bit", "leave weight_dtype out"]),
        (["--clip=none"], ["clip = none", "use optimizer adamw8bit"]),
        (["--optimizer_device", "device"], ["optimizer_device = device", "leave optimizer_device out"]),
        (["--host_threads", "4"], ["host_threads = 4 does not go with optimizer = adamw", "leave host_threads out"]),
        (["--host_threads=0", "--optimizer=adamw8bit"], ["host_threads = '0'", "a whole number above 0"]),
        (["--optimizer=adamw8bit", "--master=residual"], ["no effect", "use weight_dtype bf16"]),
        (["--optimizer", "adam"], ["optimizer = 'adam'", "one of adamw, adamw8bit"]),
        (["--seed", "x", "--tau", "x"], ["and 1 more"]),
        (["stray"], ["unexpected argument 'stray'"]),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_says_what_to_do(yaml_file, words, expected):
    with pytest.raises(UsageError) as caught:
        load_config(yaml_file(MINIMAL), words)
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "lerning_rate: 1\n", ["unknown key 'lerning_rate' in", "my.yaml", "'learning_rate'"]),
        (MINIMAL + "3: 1\n", ["unknown key '3'"]),
        (MINIMAL + "train_batch_size: true\n", ["train_batch_size = true", "a whole number above 0", "my.yaml"]),
        (MINIMAL + "learning_rate: [1]\n", ["learning_rate = [1]", "a number above 0", "my.yaml"]),
        (MINIMAL + "seed: 1\nseed: 2\n", ["line 3", "'seed' is set twice"]),
        (MINIMAL + "seed: [1\n", ["my.yaml", "line 3"]),
        ("- a\n", ["holds list, not lines of 'key: value'"]),
        ("", ["pretrained_model_name_or_path is not set", "--pretrained_model_name_or_path"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(yaml_file, text, expected):
    with pytest.raises(UsageError) as caught:
        load_config(yaml_file(text))
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shaeps", ["neither a preset (flux1_dev, ", ", shapes) nor a file", "nearest preset is 'shapes'"]),
        ("there/is/none.yaml", ["config file 'there/is/none.yaml' does not exist"]),
        ("none.yaml", ["config file 'none.yaml' does not exist"]),
    ],
)
def test_a_missing_config_is_named(name, expected):
    with pytest.raises(UsageError) as caught:
        load_config(name)
    for part in expected:
        assert part in str(caught.value)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(UsageError, match="is a folder; name the YAML file"):
        load_config(tmp_path)


def test_bytes_are_no_config(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_config(tmp_path / "x.yaml")


def test_split_overrides_leaves_the_callers_words_alone():
    words = ["shapes", "--prompt", "a circle", "--seed", "3", "--num-images=2", "--use_ema", "--tau=1", "-h"]
    others, overrides = split_overrides(words, reserved=["prompt", "num_images"])
    assert others == ["shapes", "--prompt", "a circle", "--num_images=2", "-h"]
    assert overrides == ["--seed=3", "--use_ema=true", "--tau=1"]


def test_a_flag_does_not_swallow_the_config():
    assert split_overrides(["--use_ema", "shapes"]) == (["shapes"], ["--use_ema=true"])
    assert split_overrides(["--use_ema", "false", "shapes"]) == (["shapes"], ["--use_ema=false"])


def checkpoint(folder, step, whole=True):
    path = folder / f"checkpoint-{step:06d}"
    path.mkdir(parents=True)
    if whole:
        (path / "trainer_state.json").write_text("{}")
    return path


def test_a_new_or_foreign_folder_may_be_used(tmp_path):
    assert check_output_dir(config(output_dir=str(tmp_path / "new"))) is None
    (tmp_path / "notes.txt").write_text("mine")
    assert check_output_dir(config(output_dir=str(tmp_path))) is None


@pytest.mark.parametrize("trace", ["config.yaml", "metrics.jsonl", "checkpoint-000050"])
def test_a_folder_with_a_run_is_refused(tmp_path, trace):
    if trace.startswith("checkpoint"):
        checkpoint(tmp_path, 50)
    else:
        (tmp_path / trace).write_text("")
    with pytest.raises(UsageError, match=r"already holds a run; .*--resume_from_checkpoint latest.*--output_dir"):
        check_output_dir(config(output_dir=str(tmp_path)))


def test_output_dir_must_not_be_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_output_dir(config(output_dir=str(tmp_path / "file")))


def test_latest_is_the_whole_checkpoint_of_the_highest_step(tmp_path):
    checkpoint(tmp_path, 999_950)
    last = checkpoint(tmp_path, 1_000_000)  # sorts before 999950 as text
    checkpoint(tmp_path, 1_000_050, whole=False)
    (tmp_path / "checkpoint-tmp").mkdir()
    assert check_output_dir(config(output_dir=str(tmp_path), resume_from_checkpoint="latest")) == last


def test_latest_starts_over_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert check_output_dir(config(output_dir=str(tmp_path), resume_from_checkpoint="latest")) is None


def test_latest_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="holds no run and no checkpoint; correct --output_dir"):
        check_output_dir(config(output_dir=str(tmp_path / "typo"), resume_from_checkpoint="latest"))


def test_a_checkpoint_may_be_named_or_given_as_a_path(tmp_path):
    path = checkpoint(tmp_path, 50)
    (tmp_path / "config.yaml").write_text("")
    for wanted in ("checkpoint-000050", str(path)):
        assert check_output_dir(config(output_dir=str(tmp_path), resume_from_checkpoint=wanted)) == path
    with pytest.raises(
        UsageError, match=r"'checkpoint-000070' is no checkpoint in .*; the folder has checkpoint-000050"
    ):
        check_output_dir(config(output_dir=str(tmp_path), resume_from_checkpoint="checkpoint-000070"))


def test_a_checkpoint_of_another_run_starts_a_new_folder_only(tmp_path):
    foreign = checkpoint(tmp_path / "a", 50)
    resume = {"resume_from_checkpoint": str(foreign)}
    assert check_output_dir(config(output_dir=str(tmp_path / "b"), **resume)) == foreign
    checkpoint(tmp_path / "c", 10)
    with pytest.raises(UsageError, match="belongs to another run"):
        check_output_dir(config(output_dir=str(tmp_path / "c"), **resume))
