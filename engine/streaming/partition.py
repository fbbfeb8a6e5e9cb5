"""From a module to a store: which parameters travel together, and how they become views of the host's memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from leapalign.engine.backbones import Backbone, Stage
from leapalign.engine.memory.store import BlockStore, Unit
from leapalign.engine.plan import MemoryPlan


def modulation_unit(stage: Stage) -> str:
    """Name of the unit that holds a stage's hoisted linears."""
    return f"{stage.name}/modulation"


def stages_of(backbone: Backbone) -> list[Stage]:
    """All stages in the order of the forward pass."""
    condition = [backbone.condition] if backbone.condition is not None else []
    return [*condition, backbone.stem, *backbone.blocks, backbone.head]


def units_of(backbone: Backbone) -> tuple[list[Unit], dict[str, str]]:
    """Units for all parameters, and {stage name: unit name}. Stages that share a parameter share a unit."""
    shapes = {name: parameter.shape for name, parameter in backbone.module.named_parameters()}
    groups: list[tuple[list[str], set[str]]] = []  # stage names, parameter names
    for stage in stages_of(backbone):
        stages, names = [stage.name], set(stage.parameters)
        for group in [group for group in groups if group[1] & names]:
            groups.remove(group)
            stages, names = [*group[0], *stages], names | group[1]
        groups.append((stages, names))
    units = [Unit("+".join(stages), {n: s for n, s in shapes.items() if n in names}) for stages, names in groups]
    unit_of = {stage: "+".join(stages) for stages, _ in groups for stage in stages}
    for stage in stages_of(backbone):
        if stage.modulation:
            linears = {f"{linear}.{kind}" for linear in stage.modulation for kind in ("weight", "bias")}
            units.append(Unit(modulation_unit(stage), {n: s for n, s in shapes.items() if n in linears}))
    left = shapes.keys() - {name for unit in units for name in unit.shapes}
    if left:
        units.append(Unit("unused", {name: shape for name, shape in shapes.items() if name in left}))
    return units, unit_of


def resident_units(backbone: Backbone, plan: MemoryPlan, unit_of: Mapping[str, str]) -> list[str]:
    """The units that stay on the device: the plan's first blocks, and with any of them what is no block.

    Hoisted linears, which run once a step, never do.
    """
    if not plan.keeps_ends:
        return []
    blocks = backbone.blocks[: plan.resident_blocks(len(backbone.blocks))]
    chosen = {unit_of[stage.name] for stage in stages_of(backbone) if stage in blocks or stage not in backbone.blocks}
    return [name for name in dict.fromkeys(unit_of.values()) if name in chosen]


def one_dtype(module: nn.Module) -> torch.dtype:
    """The floating dtype of all parameters; ValueError if they have several, another, or are none."""
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if len(dtypes) == 1 and all(dtype.is_floating_point for dtype in dtypes):
        return dtypes.pop()
    found = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "no dtype: there are none"
    raise ValueError(
        f"the parameters of {type(module).__name__} have {found}; a streamed model has one floating dtype: convert it "
        "first, e.g. transformer.to(torch.bfloat16)"
    )


def meta_transformer(config: Mapping[str, Any] | Path | str, dtype: torch.dtype) -> nn.Module:
    """A diffusers transformer without memory, from its config.json (a dictionary, the file or its folder).

    Raises:
        ValueError: no such file, or a class that diffusers does not know.
    """
    if not isinstance(config, Mapping):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no transformer's config.json: {error}") from None
        assert isinstance(config, dict)
    import diffusers

    name = str(config.get("_class_name", "FluxTransformer2DModel"))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"_class_name={name}: no such class in diffusers; give a transformer's config.json")
    with torch.device("meta"), default_dtype(dtype):
        module: nn.Module = kind.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    return module


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside the block have this dtype: `.to(dtype)` fails on fake parameters, and warns in diffusers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def fill_buffers(module: nn.Module, files: Sequence[Path]) -> dict[str, Tensor]:
    """Give a module on meta the buffers that the files hold, and return them by name."""
    found: dict[str, Tensor] = {}
    names = {name for name, _ in module.named_buffers()}
    for path in files if names else []:
        with safe_open(path, framework="pt") as file:
            for name in names & set(file.keys()):
                found[name] = file.get_tensor(name).clone()
                owner, _, attribute = name.rpartition(".")
                setattr(module.get_submodule(owner), attribute, found[name])
    if names - found.keys():
        raise ValueError(f"buffer {min(names - found.keys())} is not in the files: load the model, then wrap it")
    return found


def adopt(module: nn.Module, store: BlockStore) -> dict[str, list[nn.Parameter]]:
    """Move the module's parameters into the store and make them views of it.

    They stay the same objects if they were in host memory; those of another device are replaced.

    Returns:
        {unit: its parameters, in the unit's order}.
    """
    views = store.parameters()
    adopted: dict[int, nn.Parameter] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if id(parameter) not in adopted:
            view = views[name]
            if parameter.device.type != "meta":
                with torch.no_grad():
                    view.copy_(parameter)
            if parameter.device == view.device:
                parameter.data = view
                adopted[id(parameter)] = parameter
            else:
                adopted[id(parameter)] = nn.Parameter(view, requires_grad=parameter.requires_grad)
        if adopted[id(parameter)] is not parameter:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, adopted[id(parameter)])
    parameters = dict(module.named_parameters())
    return {name: [parameters[full] for full in unit.shapes] for name, unit in store.units.items()}
