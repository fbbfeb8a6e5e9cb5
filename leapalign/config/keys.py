"""The settings of a run: one flat, frozen, typed model, one docstring a key.

Names are those of diffusers' training scripts where they exist. `leapalign.config.loading` reads, overrides and saves
them.
"""

import functools
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from leapalign.engine.memory.sizes import parse_bytes
from leapalign.extensions import names
from leapalign.rewards import REWARDS


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        validate_default=True,
    )


class ModelKeys(_Section):
    """Model"""

    pretrained_model_name_or_path: str = Field(min_length=1)
    """Pipeline in the diffusers layout: 'shapes' (packaged), a local folder or a hub id such as owner/name."""
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", examples=["auto", "cpu", "mps", "cuda", "cuda:1"]
    )
    """Where the run computes: auto (the GPU if there is one), cpu, mps, cuda or cuda:1."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 evaluates the models in bfloat16, with float32 weights (executor autograd; streamed: see weight_dtype)."""
    gradient_checkpointing: bool = False
    """Recompute the transformer's blocks in backward: less memory, a third more arithmetic."""
    executor: Literal["autograd", "streamed"] = "streamed"
    """streamed keeps weights and AdamW states in host memory, planned for vram and ram; autograd on the device."""
    vram: str | None = None
    """Device memory that a streamed run may take, e.g. 24GiB; null: all that is free (for `leapalign plan`: any)."""
    ram: str | None = None
    """Host memory that a streamed run may take, e.g. 64GiB; null: all that is free (for `leapalign plan`: any)."""
    streamed_mode: Literal["paired", "held"] | None = None
    """How streamed uses a weight twice: paired runs the later leap once more; held keeps its gradients on the host."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Fused Triton kernels in blocks and optimizer (executor streamed): auto takes them on a GPU, torch none."""
    attention: Literal["auto", "native", "cudnn", "flash", "xformers"] = "auto"
    """Attention: native is torch's, as is auto; cudnn, flash (flash-attn) and xformers need bf16 weights on a GPU."""


class DataKeys(_Section):
    """Prompts and pictures"""

    train_prompts: str | None = None
    """Prompts to train on: a .txt file (one a line), a .jsonl file ("prompt"), shapes:train or a `datasets` id."""
    resolution: PositiveInt = 720
    """Height and width of the pictures in pixels, divisible by 16."""
    max_sequence_length: PositiveInt = 512
    """Tokens of the T5 embedding a prompt; longer prompts are cut."""
    cache_dir: str | None = None
    """Folder of the cached prompt embeddings; null: $LEAPALIGN_CACHE, else leapalign/ in the user's cache folder."""


class MethodKeys(_Section):
    """Rollout, reward and LeapAlign"""

    num_inference_steps: int = 25
    """Euler steps of the training rollout; two of them are the leaps, so 2 or more."""
    guidance_scale: NonNegativeFloat = 3.5
    """Guidance given to the transformer (FLUX.1-dev's embedded guidance)."""
    reward: str = Field("pickscore", examples=[*REWARDS])
    """Differentiable reward: shapes (packaged, for the shapes pipeline), pickscore, clipscore, or module:name."""
    reward_model_name_or_path: str | None = None
    """Folder or hub id of the reward's CLIP model; null takes the published one."""
    alpha: float = Field(0.3, ge=0, le=1)
    """Discount of the gradient that passes through the later leap (eq. 9): 0 drops it, 1 keeps it whole."""
    tau: PositiveFloat = 0.1
    """Floor of each leap's distance in the similarity weight (eq. 12)."""
    threshold: float = 0.55
    """Hinge of the loss (eq. 13), in the reward's own scale: samples at or above it give no gradient."""
    seed: NonNegativeInt = 0
    """Noise, steps k and j and prompt order are functions of (seed, step, sample)."""


class OptimizerKeys(_Section):
    """Optimization"""

    train_batch_size: PositiveInt = 4
    """Samples a gradient pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Passes averaged into one optimizer step; the global batch is train_batch_size times this."""
    microbatch: PositiveInt | None = None
    """Samples the models evaluate at once; null: as planned (autograd: train_batch_size). Less needs less memory."""
    max_train_steps: PositiveInt = 300
    """Optimizer steps of the run."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw keeps float32 moments, 8 bytes a parameter; adamw8bit (executor streamed) 2, and updates block by block."""
    optimizer_device: Literal["host", "device"] | None = None
    """Where adamw8bit updates: on the host, or on the device with states streamed in and out; null: as planned."""
    host_threads: PositiveInt | None = None
    """Threads of adamw8bit's update on the host; null: as many as torch has. They sleep while there is none."""
    host_cores: list[NonNegativeInt] | None = None
    """Cores that those threads are pinned to, one after the other (Linux); null: wherever the system puts them."""
    weight_dtype: Literal["float32", "bf16"] = "float32"
    """Format of the trained weights, and what streamed computes in; bf16 (with adamw8bit) rounds stochastically."""
    master: Literal["stochastic", "residual", "float32"] = "stochastic"
    """How bf16 weights keep small updates: stochastic rounding alone, 8 more bits in a residual, or a float32 copy."""
    learning_rate: PositiveFloat = 1e-5
    """AdamW's learning rate after warm-up."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "constant"
    """Course of the learning rate; all but constant begin with lr_warmup_steps."""
    lr_warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises from zero."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the second moment."""
    adam_weight_decay: NonNegativeFloat = 1e-4
    """AdamW's decoupled weight decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient norm is clipped to this; see clip."""
    clip: Literal["global", "block", "none"] = "global"
    """global: by the norm of all, which adamw8bit holds on the host (bf16: 2 bytes a parameter); block: by its own."""
    use_ema: bool = True
    """Keep an exponential moving average of the weights, in their dtype; the final transformer/ is the average."""
    ema_decay: float = Field(0.995, ge=0, lt=1)
    """Decay of the average an optimizer step."""


class OutputKeys(_Section):
    """Output folder, checkpoints and trackers"""

    output_dir: str = Field("leapalign-run", min_length=1)
    """Folder of the run: config.yaml, metrics.jsonl, logs/, samples/, checkpoint-*/, transformer/, README.md."""
    checkpointing_steps: PositiveInt = 50
    """Save a checkpoint every so many optimizer steps."""
    checkpoints_total_limit: PositiveInt | None = None
    """Checkpoints to keep, newest first; null keeps all."""
    resume_from_checkpoint: str | None = None
    """Go on with the run in output_dir: latest, or a checkpoint's name or path."""
    report_to: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Trackers beside metrics.jsonl."""
    run_name: str | None = None
    """The run's name in trackers and in the model card; null: the output folder's name."""


class ValidationKeys(_Section):
    """Validation"""

    validation_prompts: str | list[str] | None = None
    """Prompts of the previews and of `leapalign evaluate`: a source as for train_prompts, or a list of prompts."""
    validation_steps: PositiveInt = 50
    """Draw the validation pictures every so many optimizer steps, and at the start and the end."""
    validation_images_per_prompt: PositiveInt = 4
    """Pictures a prompt, from the same noise before and after."""
    validation_inference_steps: int = Field(50, ge=2)
    """Euler steps of validation, evaluation and `leapalign sample`."""


SECTIONS: tuple[type[_Section], ...] = (
    ModelKeys,
    DataKeys,
    MethodKeys,
    OptimizerKeys,
    OutputKeys,
    ValidationKeys,
)


# The last base's fields come first: the order of SECTIONS.
class AlignConfig(ValidationKeys, OutputKeys, OptimizerKeys, MethodKeys, DataKeys, ModelKeys):
    """All settings of a run, flat and frozen; see the sections above for the keys.

    Raises:
        pydantic.ValidationError (a ValueError): wrong type or range, unknown key, or settings that contradict
            each other; the message names the key, the value and the fix. `load_config` makes one line of it.
    """

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        key = str(info.field_name)
        if isinstance(value, bool) and cls.model_fields[key].annotation is not bool:
            raise ValueError(f"{key} = {str(value).lower()}: expected {accepts(key)}")
        return value

    @field_validator("output_dir", "cache_dir", "resume_from_checkpoint", "pretrained_model_name_or_path")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return str(Path(value).expanduser()) if value and value.startswith("~") else value

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, value: str) -> str:
        known = names("rewards", REWARDS)
        if value not in known and ":" not in value:
            raise ValueError(f"reward = {value!r}: expected one of {', '.join(known)}, or module:name")
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("resolution")
    @classmethod
    def _whole_patches(cls, value: int) -> int:
        if value % 16:
            below, above = value // 16 * 16, value // 16 * 16 + 16
            fix = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"resolution = {value} is not divisible by 16 (latents of 8 pixels, patches of 2); use {fix}"
            )
        return value

    @field_validator("vram", "ram")
    @classmethod
    def _size(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            parse_bytes(value, str(info.field_name))
        return value

    @field_validator("num_inference_steps")
    @classmethod
    def _two_leaps(cls, value: int) -> int:
        if value < 2:
            raise ValueError(f"num_inference_steps = {value}: LeapAlign leaps from two different steps; use 2 or more")
        return value

    @model_validator(mode="after")
    def _no_conflicts(self) -> "AlignConfig":
        if self.microbatch is not None and self.microbatch > self.train_batch_size:
            raise ValueError(
                f"microbatch = {self.microbatch} exceeds train_batch_size = {self.train_batch_size}; "
                f"lower microbatch to {self.train_batch_size} or leave it out"
            )
        if self.executor == "streamed":
            self._can_be_streamed()
        else:
            for key in ("vram", "ram", "streamed_mode"):
                if (value := getattr(self, key)) is not None:
                    raise ValueError(
                        f"{key} = {value} has no effect with executor = {self.executor}; "
                        f"use executor streamed, or leave {key} out"
                    )
            if self.kernels == "triton":
                raise ValueError(
                    f"kernels = triton has no effect with executor = {self.executor}; "
                    "use executor streamed, or leave kernels out"
                )
        self._optimizer_fits()
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                f"lr_warmup_steps = {self.lr_warmup_steps} has no effect with lr_scheduler = constant; "
                "use lr_scheduler constant_with_warmup, or lr_warmup_steps 0"
            )
        if self.reward == "shapes" and self.reward_model_name_or_path is not None:
            raise ValueError(
                f"reward_model_name_or_path = {self.reward_model_name_or_path!r} does not go with reward = shapes, "
                "which is packaged; leave it out, or use reward pickscore or clipscore"
            )
        return self

    def _can_be_streamed(self) -> None:
        if self.mixed_precision != "no":
            raise ValueError(
                f"mixed_precision = {self.mixed_precision} does not go with executor = streamed, which computes in the "
                f"dtype of the weights, {self.weight_dtype}; use executor autograd, or mixed_precision no with "
                "optimizer adamw8bit and weight_dtype bf16 for bfloat16"
            )
        if self.device == "mps":
            raise ValueError(
                f"device = {self.device} does not go with executor = streamed; use executor autograd, or cuda or cpu"
            )

    def _optimizer_fits(self) -> None:
        if self.optimizer == "adamw8bit":
            if self.executor != "streamed":
                raise ValueError(
                    f"optimizer = adamw8bit does not go with executor = {self.executor}; "
                    "use executor streamed, or optimizer adamw"
                )
            if self.master != "stochastic" and self.weight_dtype == "float32":
                raise ValueError(
                    f"master = {self.master} has no effect with weight_dtype = float32; "
                    "use weight_dtype bf16, or leave master out"
                )
            return
        for key in ("weight_dtype", "clip", "master", "optimizer_device", "host_threads", "host_cores"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} = {getattr(self, key)} does not go with optimizer = {self.optimizer}; "
                    f"use optimizer adamw8bit with executor streamed, or leave {key} out"
                )


@functools.cache
def _schema() -> dict[str, dict[str, Any]]:
    return AlignConfig.model_json_schema()["properties"]


def accepts(key: str) -> str:
    """What `key` accepts, in words, e.g. ``a number above 0`` or ``one of no, bf16``."""
    return _in_words(_schema()[key])


def kind(key: str) -> str:
    """What `key` takes, as one word for --help: INT, FLOAT, TEXT, BOOL or its choices, e.g. ``no|bf16``."""
    schema = _schema()[key]
    choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
    first = choices[0].get("items", choices[0])
    if "enum" in first:
        return "|".join(first["enum"])
    if "const" in first:
        return str(first["const"])
    return {"integer": "INT", "number": "FLOAT", "boolean": "BOOL"}.get(first["type"], "TEXT")


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_in_words(choice) for choice in schema["anyOf"])
    if "enum" in schema or "examples" in schema:
        return "one of " + ", ".join(schema.get("enum") or schema["examples"])
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        return f"a list of {_in_words(schema['items']).removeprefix('one of ')}"
    noun = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    limits = {
        "minimum": "of at least",
        "exclusiveMinimum": "above",
        "exclusiveMaximum": "below",
    }
    if "minimum" in schema and "maximum" in schema:
        return f"{noun[schema['type']]} from {schema['minimum']:g} to {schema['maximum']:g}"
    bounds = [f"{words} {schema[limit]:g}" for limit, words in limits.items() if limit in schema]
    return " ".join([noun.get(schema["type"], "text"), " and ".join(bounds)]).strip()
