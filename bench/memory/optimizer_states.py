"""What optimizers keep: bytes a parameter of weights, states, and gradients that wait for the update.

Every optimizer takes one step on parameters of a FLUX block's sizes; then the storages that its weights and its state
hold are summed, each once, whatever they are called: codes, scales, maps, masters, averages, padding. Gradients are
what the parameters' `grad`, or the engine's host memory, held before the step.

    torch                 AdamW on float32 and on bfloat16 weights
    bitsandbytes          AdamW8bit; PagedAdamW8bit, whose states a GPU pages out to the host
    torchao               AdamW8bit with stochastic rounding
    FlashOptim            FlashAdamW with 24-bit weights, and without
    leapalign             its AdamW8bit, states in host memory
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.kernels.cases import optional
from leapalign.engine.backbones.sequential import SequentialBackbone
from leapalign.engine.model import StreamedModel
from leapalign.engine.optimizer.adamw8bit import AdamW8bit
from leapalign.engine.passes.autograd import GRAD
from leapalign.engine.plan import MemoryPlan
from leapalign.families.flux import FLUX1_DEV

_WIDTH = FLUX1_DEV["num_attention_heads"] * FLUX1_DEV["attention_head_dim"]
_OTHERS = ("bitsandbytes", "torchao", "flashoptim")

Held = dict[str, int]  # {"weights", "states", "gradients": bytes}


class Parameters(nn.Module):
    """The latent embedder of FLUX.1-dev, a query projection with its norm, and the output projection: 9.8M parameters.

    One of each kind: large matrices, a small one, biases, and a vector too short for blocks of 256.
    """

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        channels, head = FLUX1_DEV["in_channels"], FLUX1_DEV["attention_head_dim"]
        self.embed = nn.Linear(channels, width, dtype=dtype)
        block = nn.Sequential(nn.Linear(width, width, dtype=dtype), nn.Unflatten(-1, (-1, head)))
        block.extend([nn.RMSNorm(head, dtype=dtype), nn.Flatten(-2)])
        self.blocks = nn.ModuleList([block])
        self.head = nn.Linear(width, channels, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# ---- ways ----------------------------------------------------------------------------------------------------------


def ways() -> dict[str, Callable[[int], Held] | str]:
    """{optimizer: bytes held by its step on `Parameters` of a width, or why it cannot be asked}."""
    found: dict[str, Callable[[int], Held] | str] = {
        "leapalign AdamW8bit": _ours(),
        "leapalign, 8-bit residual": _ours(master="residual"),
        "leapalign, float32 master": _ours(master="float32"),
        "leapalign, average (EMA)": _ours(ema_decay=0.99),
        "leapalign, global-norm clip": _ours(clip="global", fused_backward=False),
        "torch AdamW, float32": _theirs(torch.optim.AdamW, torch.float32),
        "torch AdamW, bfloat16": _theirs(torch.optim.AdamW, torch.bfloat16),
    }
    for name, module, optimizer, extra in (
        ("bitsandbytes AdamW8bit", "bitsandbytes.optim", "AdamW8bit", {}),
        ("bitsandbytes PagedAdamW8bit", "bitsandbytes.optim", "PagedAdamW8bit", {}),
        ("torchao AdamW8bit", "torchao.optim", "AdamW8bit", {"bf16_stochastic_round": True}),
        ("FlashOptim FlashAdamW, 24-bit weights", "flashoptim", "FlashAdamW", {"master_weight_bits": 24}),
        ("FlashOptim FlashAdamW", "flashoptim", "FlashAdamW", {"master_weight_bits": None}),
    ):
        there = optional(module)
        found[name] = "not installed" if there is None else _theirs(getattr(there, optimizer), torch.bfloat16, extra)
    return found


def _theirs(optimizer: Any, dtype: torch.dtype, extra: Mapping[str, Any] | None = None) -> Callable[[int], Held]:
    def held(width: int) -> Held:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = Parameters(width, dtype).to(device)
        parameters = list(model.parameters())
        stepper = optimizer(parameters, lr=1e-4, **(extra or {}))
        model(torch.ones(1, model.embed.in_features, dtype=dtype, device=device)).sum().backward()
        gradients = storage_bytes(parameter.grad for parameter in parameters)
        stepper.step()
        return {
            "weights": storage_bytes(parameters),
            "states": storage_bytes(dict(stepper.state)),
            "gradients": gradients,
        }

    return held


def _ours(**settings: Any) -> Callable[[int], Held]:
    def held(width: int) -> Held:
        module = Parameters(width, torch.bfloat16)
        backbone = SequentialBackbone(
            module,
            module.blocks,
            stem=lambda m, inputs: m.embed(inputs["x"]),
            head=lambda m, carried, _: m.head(*carried),
            stem_parameters=("embed",),
            head_parameters=("head",),
            device=torch.device("cpu"),
        )
        optimizer = AdamW8bit(**{"clip": "block", "fused_backward": True, **settings})
        model = StreamedModel(backbone, MemoryPlan(), optimizer, device="cpu")
        model(x=torch.ones(1, module.embed.in_features, dtype=torch.bfloat16)).sum().backward()
        kinds = [GRAD] if model.store.holds(GRAD) else []
        gradients = storage_bytes(model.store.region(unit, kind) for unit in model.store.units for kind in kinds)
        optimizer.step()
        model.streamer.drain()
        weights = storage_bytes(model.store.region(unit) for unit in model.store.units)
        states = storage_bytes(dict(optimizer.state))
        model.close()
        return {"weights": weights, "states": states, "gradients": gradients}

    return held


def storage_bytes(held: Any) -> int:
    """Bytes of the storages behind all tensors in nested containers, each storage once."""
    found = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, _plain(held))}
    return sum(found.values())


def _plain(held: Any) -> Iterator[Tensor]:
    """Tensors that have memory: of a subclass the ones that it is made of."""
    if isinstance(held, Tensor) and hasattr(held, "__tensor_flatten__"):
        names, _ = held.__tensor_flatten__()
        yield from _plain([getattr(held, name) for name in names])
    elif isinstance(held, Tensor):
        yield held.detach()
    elif isinstance(held, Mapping):
        yield from _plain(held.values())
    elif isinstance(held, Iterable) and not isinstance(held, (str, bytes)):
        for each in held:
            yield from _plain(each)


# ---- command -------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m bench optimizer-states`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", metavar="NAME", help="also write bench/results/NAME.json")


def run(options: argparse.Namespace, unknown: list[str]) -> int:
    """Measure and print. Exit code 2 for wrong settings."""
    if unknown:
        print(f"bench optimizer-states: error: unknown argument {unknown[0]}; see --help", file=sys.stderr)
        return 2
    result = measured(_WIDTH)
    print(json.dumps(result, indent=1) if options.json else table(result))
    if options.output:
        path = record.write(options.output, ["optimizer-states", "--output", options.output], result, seeds=[])
        print(f"wrote {path.name}", file=sys.stderr)
    return 0


def measured(width: int) -> dict[str, Any]:
    """{"parameters": their number, "others": versions, "optimizers": {name: bytes a parameter, or why not}}."""
    count = sum(parameter.numel() for parameter in Parameters(width, torch.bfloat16).parameters())
    found: dict[str, Any] = {}
    for name, held in ways().items():
        if isinstance(held, str):
            found[name] = {"absent": held}
            continue
        try:
            found[name] = {kind: number / count for kind, number in held(width).items()}
        except Exception as reason:  # someone else's code, which may want a GPU
            if name.startswith("leapalign"):
                raise
            found[name] = {"absent": (str(reason).strip() or type(reason).__name__).splitlines()[0][:120]}
    others = {name: metadata.version(name) for name in _OTHERS if optional(name) is not None}
    return {"parameters": count, "others": others, "optimizers": found}


def table(result: Mapping[str, Any]) -> str:
    """The result as aligned text."""
    lines = [f"bytes a parameter{'':22}{'weights':>9}{'states':>9}{'gradients':>11}{'sum':>9}"]
    for name, row in result["optimizers"].items():
        if "absent" in row:
            lines.append(f"{name:39}{row['absent']}")
            continue
        cells = f"{row['weights']:9.3f}{row['states']:9.3f}{row['gradients']:11.3f}"
        lines.append(f"{name:39}{cells}{sum(row.values()):9.3f}")
    return "\n".join(lines)
