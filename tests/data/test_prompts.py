"""Prompt sources: text, JSON lines, lists, the shapes world, data set ids, and what is wrong with them."""

import sys
import types

import pytest

from leapalign.data.prompts import Prompt, load_prompts
from leapalign.errors import UsageError


@pytest.fixture
def write(tmp_path):
    def to_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return to_file


def test_text_is_one_prompt_a_line(write):
    source = write("p.txt", "\ufeffa red circle\r\n\r\n  a blue square \n# not a comment\n")
    assert load_prompts(source) == [Prompt("a red circle"), Prompt("a blue square"), Prompt("# not a comment")]


def test_only_newlines_end_a_prompt(write):
    assert load_prompts(write("p.txt", "a\u2028b\x0bc\n")) == [Prompt("a\u2028b\x0bc")]


def test_json_lines_keep_the_other_keys_as_metadata(write):
    source = write("p.jsonl", '{"prompt": "a red circle", "category": "colors", "n": [1]}\n\n{"prompt": "two"}\n')
    assert load_prompts(source) == [Prompt("a red circle", {"category": "colors", "n": [1]}), Prompt("two")]


def test_repeats_and_order_stay():
    assert [prompt.text for prompt in load_prompts(["b", "a", " ", "b"])] == ["b", "a", "b"]


def test_shapes_splits_carry_what_the_checker_needs():
    train, held_out = load_prompts("shapes:train"), load_prompts("shapes:validation")
    for prompt in train + held_out:
        assert prompt.text
        assert {"category", "objects"} <= set(prompt.metadata)
        assert "prompt" not in prompt.metadata
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in held_out}


def fake_datasets(monkeypatch, **columns):
    class Rows(dict):
        @property
        def column_names(self):
            return list(self)

    module = types.ModuleType("datasets")
    vars(module)["load_dataset"] = lambda name, split: Rows(columns)
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_data_set_gives_its_prompt_column(monkeypatch):
    fake_datasets(monkeypatch, prompt=["a circle", "", None, "a square"], url=["x"])
    assert [prompt.text for prompt in load_prompts("owner/name")] == ["a circle", "a square"]


def test_a_data_set_without_prompts_names_its_columns(monkeypatch):
    fake_datasets(monkeypatch, caption=["a circle"])
    with pytest.raises(UsageError, match="no column 'prompt' but caption"):
        load_prompts("owner/name")


def test_a_data_set_id_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        load_prompts("owner/name", key="train_prompts")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", "", "has no prompts; give at least one"),
        ("blank.txt", " \n\n", "has no prompts"),
        ("empty.jsonl", "\n", "has no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt": \n', "bad.jsonl, line 2 is not JSON"),
        ("nokey.jsonl", '{"text": "a"}\n', "nokey.jsonl, line 1 has no 'prompt'"),
        ("blankkey.jsonl", '{"prompt": " "}\n', "line 1 has no 'prompt'"),
        ("list.jsonl", '["a"]\n', "line 1 has no 'prompt'"),
        ("number.jsonl", '{"prompt": 3}\n', "line 1 has no 'prompt'"),
        ("table.csv", "prompt\na\n", "neither .txt nor .jsonl"),
        ("latin.txt", b"caf\xe9\n", "is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_in_one_line(write, name, content, expected):
    with pytest.raises(UsageError) as caught:
        load_prompts(write(name, content), key="train_prompts")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("train_prompts: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "validation_prompts is not set"),
        ("nope.txt", "validation_prompts: file 'nope.txt' does not exist"),
        ("./nope", "file './nope' does not exist"),
        ("shapes:test", "give shapes:train or shapes:validation"),
        ([], "the list has no prompts"),
        (["", " "], "the list has no prompts"),
        (".", "'.' is a folder"),
    ],
)
def test_a_source_that_is_not_there_is_told_in_one_line(source, expected):
    with pytest.raises(UsageError) as caught:
        load_prompts(source, key="validation_prompts")
    assert expected in str(caught.value)
