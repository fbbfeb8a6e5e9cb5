"""Puts the trained parts together: a stock FluxPipeline folder in fp16 safetensors, and how it was made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import FluxPipeline

from leapalign.zoo.shapes import PIPELINE_FOLDER, REWARD_FOLDER
from leapalign.zoo.shapes.pretraining.networks import build_scheduler
from leapalign.zoo.shapes.pretraining.train_autoencoder import load_autoencoder
from leapalign.zoo.shapes.pretraining.train_flow import TextToFlow, accuracy
from leapalign.zoo.shapes.pretraining.train_guidance import load_average

STAGES = ("autoencoder", "flow", "guidance", "reward")


def assemble(work: Path) -> tuple[FluxPipeline, TextToFlow]:
    """The pipeline with the averaged weights of the last stage. Raises FileNotFoundError where a stage has not run."""
    model = load_average(work, "guidance")
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=load_autoencoder(work, "cpu"),
        text_encoder=model.clip,
        tokenizer=model.clip_tokenizer,
        text_encoder_2=model.t5,
        tokenizer_2=model.t5_tokenizer,
        transformer=model.transformer,
    )
    return pipeline, model


def _seconds(state_file: Path) -> float:
    return float(torch.load(state_file, map_location="cpu", weights_only=True)["progress"]["seconds"])


def export(work: Path) -> None:
    """Replace the package's `pipeline/` and `reward/` folders by what `work` holds, with a `training.json`."""
    pipeline, model = assemble(work)
    scores = accuracy(model, pipeline.vae, "cpu", per_prompt=8)
    shutil.rmtree(PIPELINE_FOLDER, ignore_errors=True)
    pipeline.to(dtype=torch.float16).save_pretrained(PIPELINE_FOLDER)
    for name in ("model_index.json", "tokenizer/tokenizer_config.json", "tokenizer_2/tokenizer_config.json"):
        file = PIPELINE_FOLDER / name  # transformers 5 writes its internal class, which version 4 does not have
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    shutil.rmtree(REWARD_FOLDER, ignore_errors=True)
    shutil.copytree(work / "reward", REWARD_FOLDER)
    record = {
        "command": "python -m leapalign.zoo.shapes train",
        "minutes": {stage: round(_seconds(work / f"{stage}.pt") / 60, 1) for stage in STAGES},
        "accuracy": {name: round(value, 4) for name, value in scores.items()},
        "reward": json.loads((REWARD_FOLDER / "config.json").read_text()),
    }
    (PIPELINE_FOLDER / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    files = [f for folder in (PIPELINE_FOLDER, REWARD_FOLDER) for f in folder.rglob("*") if f.is_file()]
    print(f"accuracy before alignment: {record['accuracy']}")
    print(f"wrote {len(files)} files, {sum(f.stat().st_size for f in files) / 2**20:.1f} MiB")
