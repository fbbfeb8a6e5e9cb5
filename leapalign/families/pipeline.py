"""A FLUX pipeline without its text encoders: transformer, VAE, scheduler, and the tensors that go in and come out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.errors import UsageError
from leapalign.method.schedule import shifted_sigmas

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from leapalign.config.keys import AlignConfig
    from leapalign.engine.model import StreamedModel
    from leapalign.engine.plan import MemoryPlan

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one, else the CPU. A GPU has its index.

    Raises:
        UsageError: a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    missing_cuda = device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    if missing_cuda or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise UsageError(f"device = {name}: torch {torch.__version__} sees no such device here; use auto or cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else device


def resolve_model(name: str) -> Path | str:
    """`shapes` is the packaged pipeline's folder, an existing folder is itself, anything else must be a hub id.

    Raises:
        UsageError: neither of them, or a folder that is not a FLUX pipeline.
    """
    key = f"pretrained_model_name_or_path = '{name}'"
    if name == "shapes":
        from leapalign.zoo.shapes import PIPELINE_FOLDER

        folder = PIPELINE_FOLDER
    elif Path(name).is_dir():
        folder = Path(name)
    elif re.fullmatch(_HUB_ID, name):
        return name
    else:
        raise UsageError(f"{key} does not exist; name a folder, a hub id (owner/name) or 'shapes'")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{key}: {folder} has no model_index.json; name a pipeline folder in the diffusers layout")
    kind = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    if kind != "FluxPipeline":
        raise UsageError(f"{key} is a {kind}; only FluxPipeline is supported")
    return folder


@dataclass(frozen=True)
class FlowPipeline:
    """What alignment and sampling need of a FLUX pipeline.

    Attributes:
        transformer: float32 weights that require grad; in eval mode (no dropout, so that a second evaluation is the
            rollout's own). A StreamedModel has them in host memory, perhaps in bfloat16, and computes on the device.
        vae: frozen, in eval mode, in its own dtype. On the device; or if the transformer is streamed in host memory,
            from where it comes to the device inside `visit`.
        scheduler: gives the sigmas; its stepping is not used.
        source: folder or hub id the pipeline came from.
    """

    transformer: FluxTransformer2DModel | StreamedModel
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    source: Path | str

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        device: torch.device = self.transformer.device
        return device

    @property
    def home(self) -> torch.device:
        """Where latents and prompt embeddings wait between evaluations: host memory if the transformer is streamed."""
        from leapalign.engine.model import StreamedModel

        return torch.device("cpu") if isinstance(self.transformer, StreamedModel) else self.device

    @contextmanager
    def visit(self, *models: object) -> Iterator[None]:
        """Inside the block the models are where the transformer computes, if it is streamed.

        Args:
            models: modules, or objects with modules as attributes; those that have a place of their own stay there.
        """
        from leapalign.engine.memory.module_visit import visiting

        parts = [part for model in models for part in [model, *getattr(model, "__dict__", {}).values()]]
        with ExitStack() as stack:
            for part in parts if self.home != self.device else []:
                if isinstance(part, torch.nn.Module):
                    stack.enter_context(visiting(part, self.device))
            yield

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """{name: parameter} of the transformer."""
        return dict(self.transformer.named_parameters())

    def latent_shape(self, resolution: int) -> tuple[int, int]:
        """(tokens S, channels C) of one square picture of `resolution` pixels a side, packed 2 x 2.

        Raises:
            UsageError: the side is not a whole number of patches.
        """
        patch = 2 * self._vae_scale
        if resolution < patch or resolution % patch:
            raise UsageError(f"resolution = {resolution} is not divisible by {patch}, this pipeline's patch in pixels")
        return (resolution // patch) ** 2, self.transformer.config.in_channels

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(num_steps + 1,) float32 noise levels 1 -> 0 that diffusers' FluxPipeline uses at this resolution."""
        return shifted_sigmas(self.scheduler, num_steps, self.latent_shape(resolution)[0])

    def conditioning(self, embeds: Mapping[str, Tensor], resolution: int, guidance_scale: float) -> dict[str, Any]:
        """The transformer's keyword arguments for a batch of prompt embeddings.

        Args:
            embeds: encoder_hidden_states (B, L, D) and pooled_projections (B, P), on any device in any float dtype.

        Returns:
            All at `home`: both in the transformer's dtype; txt_ids (L, 3) zeros; img_ids (S, 3) rows and columns of the
            patches; guidance (B,) float32 if the transformer embeds guidance.
        """
        conditioning = {name: e.to(device=self.home, dtype=self.transformer.dtype) for name, e in embeds.items()}
        text = conditioning["encoder_hidden_states"]
        side = resolution // (2 * self._vae_scale)
        steps = torch.arange(side, device=self.home, dtype=text.dtype)
        zero = torch.zeros(side, side, device=self.home, dtype=text.dtype)
        rows, columns = steps[:, None].expand(side, side), steps.expand(side, side)
        conditioning["img_ids"] = torch.stack([zero, rows, columns], dim=-1).reshape(side * side, 3)
        conditioning["txt_ids"] = text.new_zeros(text.shape[1], 3)
        if self.transformer.config.guidance_embeds:
            conditioning["guidance"] = torch.full((len(text),), guidance_scale, device=self.home)
        return conditioning

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of packed latents (B, S, C); differentiable, in the VAE's dtype, where it is.

        z / scaling_factor + shift_factor, VAE, x * 0.5 + 0.5, clamp. The clamp stops the gradient of saturated pixels.
        Never tiled: seams of tiles change the gradient. Pictures are square.
        """
        side = round(latents.shape[1] ** 0.5)
        assert side * side == latents.shape[1], f"{latents.shape[1]} tokens are no square picture"
        z = latents.to(self.vae.device, self.vae.dtype).unflatten(1, (side, side)).unflatten(-1, (-1, 2, 2))
        z = z.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # (B, h, w, C/4, 2, 2) -> (B, C/4, 2 h, 2 w)
        z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return (self.vae.decode(z, return_dict=False)[0] * 0.5 + 0.5).clamp(0, 1)

    @property
    def _vae_scale(self) -> int:
        """Pixels a latent pixel, along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))


def load_pipeline(
    name: str,
    *,
    device: torch.device | str = "cpu",
    transformer: str | Path | None = None,
    mixed_precision: str = "no",
    vae_dtype: torch.dtype = torch.float32,
    plan: MemoryPlan | None = None,
    weight_dtype: torch.dtype = torch.float32,
    attention: str = "auto",
) -> FlowPipeline:
    """Load transformer, VAE and scheduler of a FLUX pipeline; the text encoders stay on the disk.

    The transformer's weights are float32 unless `plan` streams them: AdamW steps of 1e-5 vanish in bfloat16 weights
    above 0.003, if they are rounded to nearest.

    Args:
        name: as for `resolve_model`.
        transformer: a transformer folder to take instead of the pipeline's own.
        mixed_precision: "bf16" evaluates the transformer under bfloat16 autocast; "no" in float32.
        vae_dtype: float32 keeps the reward's gradient exact; FLUX.1's VAE is small beside the transformer.
        plan: makes the transformer a StreamedModel with its weights in host memory; `device` is where it computes, and
            the VAE waits on the host.
        weight_dtype: of a StreamedModel's weights, which it computes in.
        attention: of a transformer that is not streamed, see `leapalign.engine.backbones.backbone_of`.

    Raises:
        UsageError: the model does not exist or cannot be loaded.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from leapalign.engine.backbones.attention import set_attention

    source = resolve_model(name)
    try:
        if plan is not None:
            assert mixed_precision == "no", "a streamed model computes in its weights' dtype"
            model = _streamed(source, transformer, plan, torch.device(device), weight_dtype)
        elif transformer is None:
            model = FluxTransformer2DModel.from_pretrained(source, subfolder="transformer", torch_dtype=torch.float32)
        else:
            model = FluxTransformer2DModel.from_pretrained(transformer, torch_dtype=torch.float32)
        vae = AutoencoderKL.from_pretrained(source, subfolder="vae", torch_dtype=vae_dtype)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(source, subfolder="scheduler")
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"pretrained_model_name_or_path = '{name}' could not be loaded: {reason}") from error
    model.eval().requires_grad_(True)
    if plan is None:
        _own_memory(model)
        model.to(device)
        set_attention(model, attention, torch.device(device))
        vae.to(device)
    elif plan.checkpoint_reward:
        vae.enable_gradient_checkpointing()
    vae.eval().requires_grad_(False)
    if mixed_precision == "bf16":
        _autocast(model)
    return FlowPipeline(model, vae, scheduler, source)


def configured_pipeline(
    config: AlignConfig,
    transformer: str | Path | None = None,
    *,
    plan: MemoryPlan | None = None,
    scored: bool = True,
) -> FlowPipeline:
    """`load_pipeline` as the run's config says: model, device, precision and executor.

    Args:
        transformer: a transformer folder to take instead of the pipeline's own.
        plan: of a streamed run; None plans for drawing pictures alone, and for a reward to score them if `scored`.

    Raises:
        UsageError: as `load_pipeline`, or memory in which no plan fits.
    """
    from leapalign.engine.backbones.attention import check_attention
    from leapalign.kernels.dispatch import allow

    device = resolve_device(config.device)
    dtype = torch.bfloat16 if config.weight_dtype == "bf16" else torch.float32
    try:
        check_attention(config.attention, device, torch.bfloat16 if config.mixed_precision == "bf16" else dtype)
    except ValueError as error:
        raise UsageError(str(error)) from None
    allow(config.kernels != "torch")
    if config.executor == "streamed" and plan is None:
        from leapalign.planning.workload import plan_run, sampling_workload

        plan = plan_run(config, device, workload=sampling_workload(config, device, scored=scored))
    return load_pipeline(
        config.pretrained_model_name_or_path,
        device=device,
        transformer=transformer,
        mixed_precision=config.mixed_precision,
        plan=plan,
        weight_dtype=dtype,
        attention=config.attention,
    )


def _streamed(
    source: Path | str,
    transformer: str | Path | None,
    plan: MemoryPlan,
    device: torch.device,
    dtype: torch.dtype,
) -> StreamedModel:
    """The transformer with its weights read from the files straight into the engine's host memory."""
    from leapalign.engine.model import StreamedModel

    if transformer is not None:
        folder = Path(transformer)
    elif isinstance(source, Path):
        folder = source / "transformer"
    else:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, allow_patterns=["transformer/*"])) / "transformer"
    return StreamedModel.from_pretrained(folder, plan, dtype=dtype, device=device)


def _own_memory(model: torch.nn.Module) -> None:
    """Move weights that are mapped from a file into memory of their own.

    The file may be replaced during the run, and mapped tensors start at any byte: CPU kernels may round differently by
    alignment, and a resumed run must give the same bits.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _autocast(model: FluxTransformer2DModel) -> None:
    """Evaluate `model` under bfloat16 autocast, wherever it is called from.

    Without autocast's weight cache: it would hold a bfloat16 copy of the model, and copies made without grad in the
    rollout would be found again by the pass that needs one.
    """
    device = next(model.parameters()).device.type
    full = torch.autocast(device, enabled=False)
    # FLUX casts the timestep to this layer's output dtype: bfloat16 would move it by up to 2/1000.
    model.x_embedder.forward = full(model.x_embedder.forward)
    model.forward = torch.autocast(device, torch.bfloat16, cache_enabled=False)(model.forward)
