"""`python -m leapalign.zoo.shapes train`: make the embedded default from nothing.

Four stages (autoencoder, flow, guidance, reward) and an export into the package. Every stage is seeded, saves its
state as it goes and goes on from there when started again; with the same seed, thread count and versions the result is
the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from leapalign.zoo.shapes.pretraining import train_autoencoder, train_flow, train_guidance, train_reward
from leapalign.zoo.shapes.pretraining.export import export

STAGES = {
    "autoencoder": train_autoencoder.train,
    "flow": train_flow.train,
    "guidance": train_guidance.train,
    "reward": train_reward.train,
}


def main() -> None:
    """Parse the command line and run the stages that it names."""
    parser = argparse.ArgumentParser(prog="python -m leapalign.zoo.shapes", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["train", "export"])
    parser.add_argument(
        "--work", type=Path, default=Path("outputs/zoo-shapes"), help="folder for states (default: %(default)s)"
    )
    parser.add_argument("--stage", choices=STAGES, help="only this stage; default: all, then export")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.command == "train":
        for name, train in STAGES.items():
            if options.stage in (None, name):
                train(options.work, options.seed, options.device)
    if options.command == "export" or options.stage is None:
        export(options.work)


if __name__ == "__main__":
    main()
