"""The embedding cache against FluxPipeline.encode_prompt: same values, computed once, whole files, lazy reads."""

import json
import logging
import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from leapalign.data import embeddings
from leapalign.data.embeddings import ENCODING_BYTES, cache_folder, embed_prompts, place
from leapalign.errors import UsageError

WORDS = ["a", "red", "blue", "circle", "square", "and"]
LENGTH = 8  # T5 tokens
PROMPTS = ["a red circle", "a blue square", "a red circle and a blue square"]


def clip_tokenizer(length):
    """Byte-pair merges that build each of WORDS from its letters, so that a word is one token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    pieces: dict[str, None] = {}
    merges = []
    for word in WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        pieces |= dict.fromkeys(letters)
        for end in range(1, len(letters)):
            merges.append(("".join(letters[:end]), letters[end]))
            pieces["".join(letters[: end + 1])] = None
    vocabulary = {piece: index for index, piece in enumerate([*special, *pieces])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def t5_tokenizer(length):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -1.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with the text half of a FluxPipeline, in the layout in which diffusers saves it."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    clip_words, t5_words = clip_tokenizer(length=16), t5_tokenizer(length=LENGTH)
    clip = CLIPTextConfig(
        vocab_size=len(clip_words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    t5 = T5Config(vocab_size=len(t5_words), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_words,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_words,
        transformer=None,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def embed(pipeline, tmp_path):
    def call(prompts, source=pipeline, **settings):
        settings = {"max_sequence_length": LENGTH, "cache_dir": tmp_path / "cache", **settings}
        return embed_prompts(source, prompts, **settings)

    return call


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_the_values_are_those_of_the_stock_pipeline(pipeline, embed):
    stock = FluxPipeline.from_pretrained(pipeline, transformer=None, vae=None)
    with torch.no_grad():
        hidden, pooled, _ = stock.encode_prompt(PROMPTS, max_sequence_length=LENGTH)
    store = embed(PROMPTS)
    batch = store.batch(PROMPTS)
    assert batch["encoder_hidden_states"].shape == (3, LENGTH, 32)
    assert batch["pooled_projections"].shape == (3, 16)
    # Same encoders in another batch size: the order of float32 sums over at most 64 terms may differ.
    torch.testing.assert_close(batch["encoder_hidden_states"], hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["pooled_projections"], pooled, rtol=1e-5, atol=1e-5)
    assert not torch.equal(hidden[0], hidden[1])  # the tiny tokenizers tell the prompts apart
    assert not torch.equal(pooled[0], pooled[1])


def test_batches_keep_order_and_repeats(embed):
    store = embed(PROMPTS)
    one = {prompt: store.batch([prompt]) for prompt in PROMPTS}
    order = [PROMPTS[2], PROMPTS[0], PROMPTS[2]]
    batch = store.batch(order)
    for name, tensor in batch.items():
        assert torch.equal(tensor, torch.cat([one[prompt][name] for prompt in order]))


def test_nothing_is_encoded_twice(embed, monkeypatch):
    assert embed([*PROMPTS, PROMPTS[0]]).encoded == 3
    monkeypatch.setattr(embeddings, "_encode", None)  # calling it would fail
    again = embed(PROMPTS[::-1])
    assert again.encoded == 0
    assert len(again) == 3
    assert all(prompt in again for prompt in PROMPTS)


def test_new_prompts_are_added_to_the_old(embed):
    first = embed(PROMPTS[:1]).batch(PROMPTS[:1])
    grown = embed(PROMPTS)
    assert grown.encoded == 2
    assert len(files(grown)) == 2
    for name, tensor in grown.batch(PROMPTS[:1]).items():
        assert torch.equal(tensor, first[name])


def test_an_embedding_does_not_depend_on_its_company(embed, tmp_path):
    together = embed(PROMPTS).batch(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = embed([prompt], cache_dir=tmp_path / f"alone-{row}").batch([prompt])
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor[0], together[name][row], rtol=1e-6, atol=1e-6)


def test_the_fingerprint_sees_encoders_and_settings(pipeline, embed, tmp_path):
    folders = {embed(PROMPTS[:1]).folder}
    folders.add(embed(PROMPTS[:1], max_sequence_length=LENGTH - 1).folder)
    folders.add(embed(PROMPTS[:1], dtype=torch.bfloat16).folder)
    other = tmp_path / "other"
    for part in pipeline.rglob("*"):
        if part.is_file():
            copy = other / part.relative_to(pipeline)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(part.read_bytes())
    assert embed(PROMPTS[:1], source=other).folder in folders  # same contents elsewhere
    weights = other / "text_encoder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1  # the last bit of the last weight; the size stays
    weights.write_bytes(changed)
    assert embed(PROMPTS[:1], source=other).folder not in folders
    assert len(folders) == 3


def test_large_files_are_told_apart_by_size_time_and_ends(pipeline, embed, monkeypatch):
    monkeypatch.setattr(embeddings, "HASH_WHOLE_BELOW", 1024)
    monkeypatch.setattr(embeddings, "MIB", 16)
    assert embed(PROMPTS[:1]).encoded == 1
    assert embed(PROMPTS[:1]).encoded == 0


def test_bfloat16_is_kept_as_bfloat16(embed):
    batch = embed(PROMPTS, dtype=torch.bfloat16).batch(PROMPTS)
    assert {tensor.dtype for tensor in batch.values()} == {torch.bfloat16}


def test_encoding_holds_no_more_than_a_file(embed, monkeypatch):
    monkeypatch.setattr(embeddings, "TOKENS_A_BATCH", LENGTH)  # one prompt a batch
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)
    store = embed(PROMPTS)
    assert len(files(store)) == 3
    assert store.batch(PROMPTS)["pooled_projections"].shape == (3, 16)


def test_a_stopped_encoding_goes_on_where_it_was(embed, monkeypatch):
    monkeypatch.setattr(embeddings, "TOKENS_A_BATCH", LENGTH)
    monkeypatch.setattr(embeddings, "SHARD_BYTES", 1)
    save, saved = embeddings.save_file, []

    def stopped_in_the_second_file(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(embeddings, "save_file", stopped_in_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        embed(PROMPTS)
    assert [path.exists() for path in saved] == [False, False]  # renamed, and removed
    monkeypatch.setattr(embeddings, "save_file", save)
    store = embed(PROMPTS)
    assert store.encoded == 2
    assert all(name.endswith(".safetensors") for name in files(store))


def test_files_list_their_prompts(embed):
    store = embed(PROMPTS)
    with safe_open(store.folder / files(store)[0], framework="pt") as file:
        assert json.loads(file.metadata()["prompts"]) == PROMPTS


def test_a_damaged_file_is_named(embed):
    store = embed(PROMPTS)
    (store.folder / "bad.safetensors").write_bytes(b"12345678")
    with pytest.raises(UsageError, match=r"bad\.safetensors' are damaged .*; delete the file"):
        embed(PROMPTS)


def test_an_unknown_prompt_is_named(embed):
    with pytest.raises(ValueError, match="'a red square' has no embedding"):
        embed(PROMPTS).batch([PROMPTS[0], "a red square"])


def test_long_prompts_are_cut_with_a_warning(embed, caplog):
    long = "a red circle and a blue square and a red square"
    with caplog.at_level(logging.WARNING, "leapalign"):
        embed([*PROMPTS, long])
    assert f"1 of 4 prompts exceed max_sequence_length = {LENGTH}" in caplog.text


@pytest.mark.parametrize("absent", ["text_encoder_2", "tokenizer"])
def test_a_pipeline_without_text_encoders_is_named(tmp_path, embed, absent):
    for name in {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"} - {absent}:
        (tmp_path / "half" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"has no {absent}/; it must be a FLUX pipeline"):
        embed(PROMPTS, source=tmp_path / "half")


def test_only_the_text_half_is_fetched_from_the_hub(pipeline, embed, monkeypatch):
    asked: dict[str, Any] = {}

    def snapshot_download(name, allow_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert embed(PROMPTS, source="owner/name").encoded == 3
    assert asked["name"] == "owner/name"
    assert not [pattern for pattern in asked["patterns"] if pattern.startswith(("transformer", "vae", "*"))]


def test_a_hub_id_that_cannot_be_fetched_is_named(embed, monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise OSError("404 Client Error.\nRepository Not Found")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UsageError, match="'owner/name' is no folder and could not be fetched: 404 Client Error"):
        embed(PROMPTS, source="owner/name")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LEAPALIGN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "leapalign"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "leapalign"
    monkeypatch.setenv("LEAPALIGN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert cache_folder(tmp_path / "set") == tmp_path / "set"


def test_encoders_that_do_not_fit_run_on_the_cpu(caplog):
    gpu, cpu, weights = torch.device("cuda"), torch.device("cpu"), 9 * 2**30
    assert place(gpu, math.inf, weights) == place(gpu, weights + ENCODING_BYTES, weights) == gpu
    assert not caplog.records
    assert place(gpu, 8 * 2**30, weights) == cpu
    assert "11.00GiB" in caplog.text and "8.00GiB" in caplog.text
    assert place(cpu, 1, weights) == cpu
