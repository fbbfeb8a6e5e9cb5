"""A flow pipeline without its text encoders: transformer, VAE, scheduler, and the tensors that go in and come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leapalign.engine.backbones.attention import set_attention
from leapalign.engine.memory.module_visit import visiting
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan
from leapalign.errors import UsageError
from leapalign.families import autoencoder
from leapalign.families.protocol import Family
from leapalign.families.source import family_of, resolve_model

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler


@dataclass(frozen=True)
class FlowPipeline:
    """What alignment and sampling need of a pipeline, of whatever family.

    Attributes:
        transformer: float32 weights that require grad; in eval mode (no dropout, so that a second evaluation is the
            rollout's own). A StreamedModel has them in host memory, perhaps in bfloat16, and computes on the device.
        vae: frozen, in eval mode, in its own dtype. On the device; or if the transformer is streamed in host memory,
            from where it comes to the device inside `visit`.
        scheduler: gives the sigmas; its stepping is not used.
        source: folder or hub id the pipeline came from.
        family: what of this is the model family's own.
    """

    transformer: Any  # the diffusers transformer, or a StreamedModel of it
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    source: Path | str
    family: Family

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        device: torch.device = self.transformer.device
        return device

    @property
    def home(self) -> torch.device:
        """Where latents and prompt embeddings wait between evaluations: host memory if the transformer is streamed."""
        return torch.device("cpu") if isinstance(self.transformer, StreamedModel) else self.device

    @contextmanager
    def visit(self, *models: object) -> Iterator[None]:
        """Inside the block the models are where the transformer computes, if it is streamed.

        Args:
            models: modules, or objects with modules as attributes; those that have a place of their own stay there.
        """
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

    def latent_shape(self, resolution: int) -> tuple[int, ...]:
        """Shape of one square picture's latents as the transformer takes them; FLUX: (tokens S, channels C).

        Raises:
            UsageError: the side is not a whole number of patches.
        """
        return self.family.latent_shape(self.transformer, self.vae, resolution)

    def sigmas(self, num_steps: int, resolution: int) -> Tensor:
        """(num_steps + 1,) float32 noise levels 1 -> 0 that the diffusers pipeline uses at this resolution."""
        return self.family.sigmas(self.scheduler, num_steps, self.latent_shape(resolution))

    def conditioning(self, embeds: Mapping[str, Tensor], resolution: int, guidance_scale: float) -> dict[str, Any]:
        """The transformer's keyword arguments for a batch of prompt embeddings, at `home`.

        Args:
            embeds: of `leapalign.data.embeddings`, B rows each, on any device in any float dtype.
        """
        here = {name: e.to(device=self.home, dtype=self.transformer.dtype) for name, e in embeds.items()}
        return self.family.conditioning(self.transformer, self.vae, here, resolution, guidance_scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of the transformer's latents; differentiable, where the VAE is.

        Pictures are square.
        """
        return autoencoder.decode(self.vae, self.family.vae_latents(self.vae, latents))


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
    """Load transformer, VAE and scheduler of a pipeline; the text encoders stay on the disk.

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
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    source = resolve_model(name)
    family = family_of(source, name)
    try:
        if plan is not None:
            assert mixed_precision == "no", "a streamed model computes in its weights' dtype"
            model = _streamed(source, transformer, plan, torch.device(device), weight_dtype)
        elif transformer is None:
            model = family.load_transformer(source, torch.float32, subfolder="transformer")
        else:
            model = family.load_transformer(transformer, torch.float32)
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
        family.autocast(model)
    return FlowPipeline(model, vae, scheduler, source, family)


def _streamed(
    source: Path | str,
    transformer: str | Path | None,
    plan: MemoryPlan,
    device: torch.device,
    dtype: torch.dtype,
) -> StreamedModel:
    """The transformer with its weights read from the files straight into the engine's host memory."""
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
