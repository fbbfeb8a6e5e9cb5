"""Any model that is a stem, a list of blocks and a head: the generic backbone for other people's trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.engine.backbones.stage import Part, Stage, check_covered, full_names, template

Carried = tuple[Tensor, ...]


class SequentialBackbone:
    """A model whose blocks run one after another over a tuple of carried tensors: see `Backbone` for the fields.

    The functions get a copy of the model into which the weights of the stage at hand have been put, so they read like
    pieces of the model's own forward. A causal language model of transformers' Llama family, its head tied or not:

        def rope(m, inputs):
            positions = torch.arange(inputs["input_ids"].shape[1], device=device)[None]
            return m.model.rotary_emb(torch.empty(0, dtype=m.dtype, device=device), positions)

        SequentialBackbone(
            model,
            model.model.layers,
            stem=lambda m, inputs: m.model.embed_tokens(inputs["input_ids"]),
            block=lambda layer, carried, rope: layer(*carried, position_embeddings=rope),
            head=lambda m, carried, rope: m.lm_head(m.model.norm(*carried)),
            constants=rope,
            device=device,
        )

    Args:
        module: the whole model; not modified.
        blocks: the list of blocks, a submodule of `module`.
        stem: stem(module, inputs) -> floating tensor (B, ...) or tuple of them.
        head: head(module, carried, constants) -> (B, ...).
        block: block(block module, carried, constants) -> the same; by default block module(*carried).
        constants: constants(module, inputs) -> what blocks and head need besides (masks, position embeddings). Called
            with the inputs of the rows that are run, so it may depend on them. Sees buffers, no weights; no gradient.
        stem_parameters, head_parameters: prefixes of the names of the weights that stem and head read. By default both
            read all that no block holds. Naming them lets the device hold less at a time. A tied weight that both read
            must be named, by its first name, in both.
        device: where the stages run.

    Raises:
        ValueError: `blocks` is empty or no submodule; a prefix that names nothing; weights that no stage reads.
    """

    condition: Stage | None = None
    condition_inputs: tuple[str, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        blocks: nn.ModuleList | nn.Sequential,
        stem: Callable[[Any, Mapping[str, Any]], Tensor | Carried],
        head: Callable[[Any, Carried, Any], Tensor],
        *,
        block: Callable[[Any, Carried, Any], Tensor | Carried] | None = None,
        constants: Callable[[Any, Mapping[str, Any]], Any] | None = None,
        stem_parameters: Iterable[str] | None = None,
        head_parameters: Iterable[str] | None = None,
        device: torch.device,
    ) -> None:
        self.module, self.device = module, device
        scale = getattr(module, "timestep_scale", None)
        self.timestep_scale: float | None = None if scale is None else float(scale)
        self.fused = False  # the caller's own modules
        prefix = next((name for name, child in module.named_modules() if child is blocks), None)
        if not prefix or len(blocks) == 0:
            raise ValueError(
                f"blocks ({len(blocks)} of them) is not a list inside {type(module).__name__}: give its own ModuleList"
            )
        shell = template(module, device)
        names = full_names(shell)
        run_block = block or _call
        held: Any = shell.get_submodule(prefix)
        children = list(held)  # not children(), which lists a block that stands there twice once

        def compute_block(child: Any, carried: Carried, condition: None, constants: Any) -> Carried:
            return _carried(run_block(child, carried, constants))

        def compute_stem(shell: Any, inputs: Mapping[str, Any]) -> Carried:
            return _carried(stem(shell, inputs))

        def compute_head(shell: Any, carried: Carried, condition: None, constants: Any) -> Tensor:
            return head(shell, carried, constants)

        self.blocks = tuple(
            Part(child, compute_block, names).stage(f"{prefix}.{index}") for index, child in enumerate(children)
        )
        # Stem and head hold the model without its blocks: their weights are not theirs to read.
        shell.set_submodule(prefix, nn.ModuleList())
        outside = [names[id(parameter)] for parameter in shell.parameters()]
        self.stem = Part(shell, compute_stem, names, _chosen("stem", outside, stem_parameters)).stage("stem")
        self.head = Part(shell, compute_head, names, _chosen("head", outside, head_parameters)).stage("head")
        self._shell, self._constants = shell, constants
        check_covered(self)

    def check_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in inputs.items() if value is not None}

    def constants(self, inputs: Mapping[str, Any]) -> Any:
        """None: they are made for the rows of each microbatch."""
        return None

    def microbatch_constants(self, constants: Any, inputs: Mapping[str, Any]) -> Any:
        if self._constants is None:
            return None
        with torch.no_grad():
            return self._constants(self._shell, inputs)

    def output(self, value: Tensor, return_dict: bool) -> Tensor:
        """What `head` returned, whatever `return_dict`."""
        return value


def _call(block: Any, carried: Carried, constants: Any) -> Carried:
    return _carried(block(*carried))


def _carried(output: Any) -> Carried:
    """A lone tensor is a tuple of one."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def _chosen(stage: str, outside: list[str], prefixes: Iterable[str] | None) -> list[str]:
    """The names in `outside` that start with one of the prefixes, dot by dot; all of them for None."""
    if prefixes is None:
        return outside
    chosen: set[str] = set()
    for prefix in prefixes:
        found = {name for name in outside if f"{name}.".startswith(f"{prefix.rstrip('.')}.")}
        if not found:
            raise ValueError(
                f"{stage}_parameters: no weight outside the blocks is called {prefix!r}; they are {', '.join(outside)}"
            )
        chosen |= found
    return [name for name in outside if name in chosen]
