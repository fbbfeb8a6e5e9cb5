"""A transformer cut into stages, condition -> stem -> blocks -> head: each a function of weights given to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leapalign.engine.backbones.velocity import is_batched


@dataclass(frozen=True)
class Stage:
    """A part of the transformer whose weights travel together, as a pure function of them.

    Attributes:
        name: "condition", "stem", "transformer_blocks.3", "head": unique in its backbone; also names its unit.
        parameters: full names, as `module.named_parameters()` gives them (a tied one once, under its first name), of
            the weights that `run` reads. Stages may share names: a tied embedding is in stem and head.
        run: takes {full name: tensor} first; other names in it are ignored, so that a whole unit may be given. What
            follows is said at `Backbone`'s fields. All tensors on the backbone's device. Differentiable, no dropout.
        modulation: full names (without ".weight", ".bias") of the linears that were hoisted out of this stage, in the
            order in which linear(silu(temb)) of each are concatenated along dim 1 to make its `condition`; else empty.
    """

    name: str
    parameters: tuple[str, ...]
    run: Callable[..., Any]
    modulation: tuple[str, ...] = ()


class Backbone(Protocol):
    """A transformer in stages. Its own weights are never read: every stage is run with weights given to it.

    `inputs` are what `check_inputs` returned, restricted to the rows that are run, on `device`.

    Attributes:
        module: the wrapped transformer, unchanged; its parameter names are the stages'.
        device: where the stages run and where `constants` are.
        condition: run(weights, inputs) -> (B, D) temb; None where there is nothing but carried tensors.
        stem: run(weights, inputs) -> carried, a tuple of floating tensors (B, ...).
        blocks: each run(weights, carried, condition, constants) -> carried, which may get shorter (the last block of
            FLUX and SD3 drops its context). `condition` is temb (B, D); (B, width), see `Stage.modulation`, if hoisted.
        head: run(weights, carried, condition, constants) -> (B, ...) the transformer's output.
        condition_inputs: names of the inputs that `condition` reads; it reads nothing else.
        fused: whether the blocks run on the fused kernels, or on their references where Triton does not compute.
        timestep_scale: factor from sigma to `timestep`, where the module is a flow transformer.
    """

    module: nn.Module
    device: torch.device
    condition: Stage | None
    stem: Stage
    blocks: tuple[Stage, ...]
    head: Stage
    condition_inputs: tuple[str, ...]
    fused: bool
    timestep_scale: float | None

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer's keyword arguments without Nones; ValueError for what stages cannot do."""
        ...

    def constants(self, inputs: Mapping[str, Any]) -> Any:
        """What blocks and head need besides, from the inputs of a whole evaluation, whatever their device; no grad."""
        ...

    def microbatch_constants(self, constants: Any, inputs: Mapping[str, Any]) -> Any:
        """What is passed to blocks and head with the rows `inputs` of that evaluation."""
        ...

    def output(self, value: Tensor, return_dict: bool) -> Any:
        """The head's result as the module's forward returns it."""
        ...


def template(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the module in evaluation mode that holds no weights: parameters on meta, buffers on `device`.

    Whatever else hangs on it (config, attention processors) is copied; tied parameters stay tied.

    Raises:
        ValueError: a buffer is on meta and `device` is not: its values are nowhere.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for name, buffer in module.named_buffers():
        if buffer.device.type == "meta" and device.type != "meta":
            raise ValueError(f"buffer {name} is on meta and has no values: make the transformer with real buffers")
        memo[id(buffer)] = buffer.detach().to(device, copy=True)
    result: nn.Module = copy.deepcopy(module, memo)
    return result.eval()


def full_names(module: nn.Module) -> dict[int, str]:
    """{id(parameter): full name}, a tied one under its first."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


class Part(nn.Module):
    """Some modules of a template, and what is to be computed with them, as a function of their weights.

    Args:
        modules: a module, or several by attribute name. They keep being the template's.
        compute: compute(modules, *arguments), where `modules` is the module or an `nn.ModuleDict` of them.
        names: `full_names` of the template, taken before anything was cut out of it.
        allowed: full names of the only parameters to swap in; None for all that `modules` hold.
    """

    def __init__(
        self,
        modules: nn.Module | dict[str, nn.Module],
        compute: Callable[..., Any],
        names: Mapping[int, str],
        allowed: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        self.held = nn.ModuleDict(modules) if isinstance(modules, dict) else modules
        self.compute = compute
        chosen = None if allowed is None else set(allowed)
        self.full = {
            local: names[id(parameter)]
            for local, parameter in self.named_parameters()
            if chosen is None or names[id(parameter)] in chosen
        }

    def forward(self, *arguments: Any) -> Any:
        return self.compute(self.held, *arguments)

    def run(self, weights: Mapping[str, Tensor], *arguments: Any) -> Any:
        """compute(modules, *arguments) with these weights {full name: tensor} in place of the template's."""
        # Not strict: buffers stay the template's own. No parameter is missed, the names are read off the modules.
        return functional_call(self, {local: weights[full] for local, full in self.full.items()}, arguments)

    def stage(self, name: str, modulation: tuple[str, ...] = ()) -> Stage:
        return Stage(name, tuple(self.full.values()), self.run, modulation)


def check_covered(backbone: Backbone) -> None:
    """ValueError if a parameter of the module is in no stage: an adapter, or a head that the stages do not know."""
    stages = [*([backbone.condition] if backbone.condition else []), backbone.stem, *backbone.blocks, backbone.head]
    covered = {name for stage in stages for name in stage.parameters}
    covered |= {f"{linear}.{kind}" for stage in stages for linear in stage.modulation for kind in ("weight", "bias")}
    left = [name for name, _ in backbone.module.named_parameters() if name not in covered]
    if left:
        raise ValueError(
            f"{type(backbone.module).__name__} has {len(left)} parameters that no stage uses, first {left[0]!r}: "
            "unload adapters; with SequentialBackbone name them in stem_parameters or head_parameters"
        )


def check_arguments(inputs: Mapping[str, Any], *, needed: tuple[str, ...], model: str) -> dict[str, Any]:
    """`inputs` without Nones, if they are tensors of these names with one row a sample; else ValueError.

    False and empty dictionaries ask for nothing and are dropped too: FluxPipeline gives joint_attention_kwargs={}.
    """
    given = {name: value for name, value in inputs.items() if isinstance(value, Tensor) or value}
    for name, value in given.items():
        if name not in needed:
            raise ValueError(
                f"{name} is not supported by the streamed {model}: leave it out (it takes {', '.join(needed)})"
            )
        if not isinstance(value, Tensor) or value.ndim == 0:
            what = "a number" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"{name} is {what}: give the streamed {model} a tensor with one row a sample")
    for name in needed:
        if name not in given:
            raise ValueError(f"{name} is missing: the streamed {model} needs {', '.join(needed)}")
    batch = given[needed[0]].shape[0]
    for name, value in given.items():
        if is_batched(name, value) and value.shape[0] != batch:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and {needed[0]} has {batch} rows: give one row a sample"
            )
    return given


def diffusers_output(sample: Tensor, return_dict: bool) -> Any:
    """What a diffusers transformer returns: an object with `sample`, or a tuple."""
    if not return_dict:
        return (sample,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput  # seconds, and not for other models

    return Transformer2DModelOutput(sample=sample)
