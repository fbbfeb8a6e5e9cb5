"""What is planned for: the budget, the step, and the machine."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leapalign.engine.backbones import Backbone, FluxBackbone, SD3Backbone
from leapalign.engine.memory.sizes import parse_bytes

PATCH = 16  # pixels a token's side: 8 a latent, 2 latents a token
DEVICE_BASE = 640 * 2**20  # a CUDA context and the workspaces of cuBLAS and attention, which no allocator shows


@dataclass(frozen=True)
class Budget:
    """Device and host memory that a step may take; None: no limit.

    Raises:
        ValueError: a size that cannot be read.
    """

    vram: int | str | None = None
    ram: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("vram", "ram"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, parse_bytes(value, name))

    @property
    def device_bytes(self) -> float:
        return math.inf if self.vram is None else int(self.vram)

    @property
    def host_bytes(self) -> float:
        return math.inf if self.ram is None else int(self.ram)


@dataclass(frozen=True)
class RewardLoad:
    """What a reward takes on the device in its phase. It is off the card in all other phases.

    Attributes:
        weight_bytes: of its models, which wait on the host.
        activation_bytes: for one picture.
        flops: for one picture, forward and backward; of sampling alone: forward.
        checkpointed: whether its decoder recomputes in backward.
        blocks: residual, attention and encoder blocks, each of them launched once a microbatch.
    """

    weight_bytes: int
    activation_bytes: int
    flops: int
    checkpointed: bool = False
    blocks: int = 0


@dataclass(frozen=True)
class Workload:
    """One optimizer step, or with `legs=0` one batch of pictures.

    Attributes:
        batch: samples that go through the model together.
        resolution, patch: pixels a side of FLUX's and SD3's pictures, and of one token of them.
        text_tokens: of the prompt.
        num_inference_steps: evaluations of the rollout; 0: none, as in supervised training.
        legs: evaluations to be differentiated; 0: pictures are drawn and decoded without gradients, nothing is trained.
        nested: a leg passes a gradient on to the next one (LeapAlign's discount is not 0).
        gradient_accumulation_steps: batches a step.
        microbatch: rows at once, of the model and of the reward; fixed by the user, or None: the planner chooses.
        mode, optimizer_on: in the same way.
        dtype: of the weights.
        kernels, attention: as for `backbone_of`; "auto" is "triton" on a machine with a GPU, for blocks that are
            diffusers' own.
        optimizer: "adamw8bit"; "adamw", whose gradients, moments and average are float32 on the host; "gradients":
            none, the float32 gradients stay on the host.
        clip: "global" holds the gradients of all weights on the host.
        master, ema: as for `leapalign.engine.optimizer.adamw8bit.AdamW8bit`.
        rewards: the ways in which the reward can run; the planner takes the quickest that fits. Empty: no reward.
        inputs: {name: tensor (1, ...) or unbatched, on meta} of models other than FLUX and SD3.

    Raises:
        ValueError: a number out of range.
    """

    batch: int = 4
    resolution: int = 512
    patch: int = PATCH
    text_tokens: int = 512
    num_inference_steps: int = 25
    legs: int = 2
    nested: bool = True
    gradient_accumulation_steps: int = 1
    microbatch: int | None = None
    mode: Literal["paired", "held"] | None = None
    optimizer_on: Literal["host", "device"] | None = None
    dtype: torch.dtype = torch.bfloat16
    kernels: Literal["auto", "triton", "torch"] = "auto"
    attention: Literal["auto", "native", "cudnn", "flash", "xformers"] = "auto"
    optimizer: Literal["adamw8bit", "adamw", "gradients"] = "adamw8bit"
    clip: Literal["global", "block", "none"] = "block"
    master: Literal["stochastic", "residual", "float32"] = "stochastic"
    ema: bool = False
    rewards: tuple[RewardLoad, ...] = ()
    inputs: dict[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        least = {
            "batch": 1,
            "patch": 1,
            "text_tokens": 1,
            "num_inference_steps": 0,
            "legs": 0,
            "gradient_accumulation_steps": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {lowest}")
        if self.microbatch is not None and not 1 <= self.microbatch <= self.batch:
            raise ValueError(f"microbatch={self.microbatch} must be from 1 to batch={self.batch}")
        if self.resolution < self.patch or self.resolution % self.patch:
            raise ValueError(f"resolution={self.resolution} must be a multiple of {self.patch} pixels")

    @property
    def holds(self) -> bool:
        """Whether the gradients of all legs are summed on the host before the first update."""
        waits = self.clip == "global" or self.gradient_accumulation_steps > 1
        return self.legs > 0 and self.optimizer == "adamw8bit" and waits

    @property
    def first_passes(self) -> int:
        """Products of single legs before the last one."""
        return max(self.legs - 1, 0) if self.nested else 0

    def with_batch(self, batch: int) -> Workload:
        """The same with fewer samples."""
        return replace(self, batch=batch, microbatch=None if self.microbatch is None else min(self.microbatch, batch))


@dataclass(frozen=True)
class Machine:
    """Rates for the predicted seconds. The defaults are for an RTX 4090 on PCIe 4.0 x16 in a desktop computer.

    Attributes:
        flops_per_s: sustained in bfloat16 matrix products and attention.
        h2d_bytes_per_s, d2h_bytes_per_s: pinned copies, both at once.
        host_bytes_per_s: memory traffic of an update on the host, 14 bytes a parameter.
        seconds_per_call: of launching one block, forward; three times that with backward.
        device_base_bytes: of device memory that is taken before anything is allocated.
    """

    flops_per_s: float = 140e12
    h2d_bytes_per_s: float = 25e9
    d2h_bytes_per_s: float = 25e9
    host_bytes_per_s: float = 20e9
    seconds_per_call: float = 0.001
    device_base_bytes: int = DEVICE_BASE

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{each.name}={value!r} must be a number of at least 0")
            if value == 0 and each.name not in ("seconds_per_call", "device_base_bytes"):
                raise ValueError(f"{each.name}=0 must be above 0")

    def defaults(self) -> list[str]:
        """Names of those that are as by default, and so perhaps another machine's."""
        return [each.name for each in fields(self) if getattr(self, each.name) == each.default]

    @classmethod
    def read(cls, path: Path | str) -> Machine:
        """From a JSON file with some or all of the fields; or with such an object as "machine", beside anything else.

        `leapalign doctor --output` writes the latter.

        Raises:
            ValueError: not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"machine={path} is no JSON file: {error}; `leapalign doctor --output FILE.json` writes one"
            ) from None
        if isinstance(values, dict) and "machine" in values:
            values = values["machine"]
        known = {each.name for each in fields(cls)}
        if not isinstance(values, dict) or not values or values.keys() - known:
            wrong = "no object"
            if isinstance(values, dict):
                wrong = f"{', '.join(sorted(values.keys() - known))} unknown" if values else "no rate in it"
            raise ValueError(f"machine={path}: {wrong}; give an object with some of {', '.join(sorted(known))}")
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"machine={path}: {error}") from None


def example_inputs(backbone: Backbone, workload: Workload, rows: int) -> dict[str, Tensor]:
    """The model's inputs for so many samples, on meta.

    Raises:
        ValueError: a model whose inputs cannot be told from the workload.
    """
    module: Any = backbone.module

    def empty(*shape: int, dtype: torch.dtype = workload.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    if workload.inputs is not None:
        return {
            name: value.expand(rows, *value.shape[1:]).clone() if value.ndim and value.shape[0] == 1 else value
            for name, value in workload.inputs.items()
        }
    if not isinstance(backbone, FluxBackbone | SD3Backbone):
        raise ValueError("inputs=None: give the workload of this model its inputs, {name: tensor (1, ...) on meta}")
    config = module.config
    given = {
        "timestep": empty(rows, dtype=torch.float32),
        "encoder_hidden_states": empty(rows, workload.text_tokens, config.joint_attention_dim),
        "pooled_projections": empty(rows, config.pooled_projection_dim),
    }
    if isinstance(backbone, SD3Backbone):
        side = workload.resolution // workload.patch * config.patch_size
        return {"hidden_states": empty(rows, config.in_channels, side, side)} | given
    tokens = (workload.resolution // workload.patch) ** 2
    given = {"hidden_states": empty(rows, tokens, config.in_channels)} | given
    given |= {"img_ids": empty(tokens, 3), "txt_ids": empty(workload.text_tokens, 3)}
    return given | ({"guidance": empty(rows, dtype=torch.float32)} if config.guidance_embeds else {})
