"""`shapes`: a complete FLUX pipeline for 32x32 pictures of coloured shapes, its reward and its rule-based checker.

The folder `pipeline/` holds the weights in the stock diffusers FluxPipeline layout and `reward/` those of the two-tower
reward; both are made by `python -m leapalign.zoo.shapes train`.
"""

from pathlib import Path

PIPELINE_FOLDER = Path(__file__).parent / "pipeline"
REWARD_FOLDER = Path(__file__).parent / "reward"
