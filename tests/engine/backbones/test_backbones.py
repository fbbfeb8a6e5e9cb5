"""FLUX and SD3 in stages: run one after another they are the transformer, and they leave it as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leapalign.engine.backbones import Backbone, Stage, backbone_of
from tests.conftest import CHANNELS, POOLED_DIM, TEXT_DIM

CPU = torch.device("cpu")
FAMILIES = ("flux", "flux-guidance", "sd3")
BATCH = 3


def flux_of_double_blocks() -> tuple[nn.Module, tuple[int, ...]]:
    """The last block is one with two streams."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=6,
        num_layers=2,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        axes_dims_rope=(4, 6, 6),
    )
    return model, (6, CHANNELS)


def sd3_of_two_attentions() -> tuple[nn.Module, tuple[int, ...]]:
    """As SD3.0 without qk_norm; the second attention in the middle and in the last block; patches of 1."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=6,
        patch_size=1,
        in_channels=CHANNELS,
        out_channels=5,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=24,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=7,
        dual_attention_layers=(1, 2),
    )
    return model, (CHANNELS, 5, 3)


OTHERS = {"flux of double blocks": flux_of_double_blocks, "sd3 of two attentions": sd3_of_two_attentions}


@pytest.fixture
def case(make_transformer: Any, make_inputs: Any) -> Any:
    """case(name, dtype) -> (transformer, its keyword arguments)."""

    def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Any]]:
        timestep = torch.linspace(0.3, 0.9, BATCH, dtype=torch.float64)
        if name in OTHERS:
            torch.manual_seed(50)
            model, shape = OTHERS[name]()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
            _, inputs = make_inputs(name.split()[0], BATCH, dtype)
            inputs["hidden_states"] = torch.randn(BATCH, *shape, dtype=torch.float64).to(dtype)
            model = model.to(dtype).eval()
        else:
            model = make_transformer(name, dtype)
            noise, inputs = make_inputs(name, BATCH, dtype)
            inputs["hidden_states"] = noise
        inputs["timestep"] = timestep * 1000 if "sd3" in name else timestep
        return model, inputs

    return make


def silu_linears(stage: Stage, weights: Mapping[str, Tensor], temb: Tensor) -> Tensor:
    """What a stage's condition is: (B, D) temb, or the outputs of its hoisted linears side by side."""
    if not stage.modulation:
        return temb
    x = nn.functional.silu(temb)
    vectors = [nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in stage.modulation]
    return torch.cat(vectors, dim=1)


def composed(backbone: Backbone, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """The stages one after another, each given only the weights that it says it reads."""

    def own(stage: Stage) -> dict[str, Tensor]:
        return {name: weights[name] for name in stage.parameters}

    inputs = backbone.check_inputs(inputs)
    constants = backbone.constants(inputs)
    constants = backbone.microbatch_constants(constants, inputs)
    assert backbone.condition is not None
    temb = backbone.condition.run(own(backbone.condition), {name: inputs[name] for name in backbone.condition_inputs})
    carried = backbone.stem.run(own(backbone.stem), inputs)
    for block in backbone.blocks:
        carried = block.run(own(block), carried, silu_linears(block, weights, temb), constants)
    head: Tensor = backbone.head.run(own(backbone.head), carried, silu_linears(backbone.head, weights, temb), constants)
    return head


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_stages_compute_the_transformers_bits(case: Any, name: str, dtype: torch.dtype) -> None:
    """The rounding of timestep and guidance to bfloat16 included."""
    model, inputs = case(name, dtype)
    with torch.no_grad():
        (expected,) = model(**inputs, return_dict=False)
        backbone = backbone_of(model, hoist=False, device=CPU)
        assert torch.equal(composed(backbone, dict(model.named_parameters()), inputs), expected)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_gradients_are_autograds(case: Any, worst_error: Any, name: str, hoist: bool, kernels: str) -> None:
    """With the fused blocks too: in float64 nothing but the order of a few products is another one."""
    model, inputs = case(name)
    weights = dict(model.named_parameters())
    differentiable = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    for key in differentiable:
        inputs[key].requires_grad_()
    targets = weights | {key: inputs[key] for key in differentiable}
    (expected,) = model(**inputs, return_dict=False)
    cotangent = torch.randn_like(expected)
    found = composed(backbone_of(model, hoist=hoist, device=CPU, kernels=kernels), weights, inputs)

    def gradients(output: Tensor) -> dict[str, Tensor]:
        values = torch.autograd.grad(output, list(targets.values()), cotangent, allow_unused=True, retain_graph=True)
        pairs = zip(targets.items(), values, strict=True)
        return {key: torch.zeros_like(target) if value is None else value for (key, target), value in pairs}

    assert (found - expected).norm() <= 1e-13 * expected.norm()
    error, where = worst_error(gradients(found), gradients(expected))
    assert error <= 1, f"{error:.3g} x tolerance at {where}"


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_every_weight_is_in_one_stage(case: Any, name: str, hoist: bool) -> None:
    model, _ = case(name)
    backbone = backbone_of(model, hoist=hoist, device=CPU)
    assert backbone.condition is not None
    stages = [backbone.condition, backbone.stem, *backbone.blocks, backbone.head]
    owned = [key for stage in stages for key in stage.parameters]
    linears = [f"{key}.{kind}" for stage in stages for key in stage.modulation for kind in ("weight", "bias")]
    assert sorted(owned + linears) == sorted(key for key, _ in model.named_parameters())
    assert len({stage.name for stage in stages}) == len(stages)
    assert bool(linears) == hoist
    if hoist:  # all linears that see temb, and only they: D columns, and rows that are a multiple of D
        dim = backbone.condition.run(dict(model.named_parameters()), case(name)[1]).shape[1]
        shapes = [model.get_parameter(f"{key}.weight").shape for stage in stages for key in stage.modulation]
        assert all(shape[1] == dim and shape[0] % dim == 0 for shape in shapes)
        assert not any("norm1.linear" in key or "norm.linear" in key for key in owned)


def test_a_quarter_of_flux_1_dev_is_modulation() -> None:
    """Counted on the real configuration: diffusers' defaults with embedded guidance."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    backbone = backbone_of(model, hoist=True, device=CPU)
    linears = [key for stage in (*backbone.blocks, backbone.head) for key in stage.modulation]
    hoisted = sum(sizes[f"{key}.weight"] + sizes[f"{key}.bias"] for key in linears)
    assert len(backbone.blocks) == 19 + 38 and len(linears) == 2 * 19 + 38 + 1
    assert (sum(sizes.values()), hoisted) == (11_901_408_320, 3_247_448_064)


def test_the_last_block_hands_on_only_what_the_head_reads(case: Any) -> None:
    for name in (*FAMILIES, *OTHERS):
        model, inputs = case(name)
        backbone, weights = backbone_of(model, hoist=False, device=CPU), dict(model.named_parameters())
        assert backbone.condition is not None
        temb, constants = backbone.condition.run(weights, inputs), backbone.constants(inputs)
        carried = backbone.stem.run(weights, inputs)
        counts = [len(carried)]
        for block in backbone.blocks:
            carried = block.run(weights, carried, temb, constants)
            counts.append(len(carried))
        assert counts == [2] * len(backbone.blocks) + [1]


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", ["flux-guidance", "sd3"])
def test_the_wrapped_transformer_is_not_touched(case: Any, name: str, hoist: bool) -> None:
    model, inputs = case(name)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    model.train()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = [(key, id(value), value.data_ptr(), value.clone()) for key, value in tensors]
    modules = [(key, id(child), type(child)) for key, child in model.named_modules()]
    composed(backbone_of(model, hoist=hoist, device=CPU), dict(model.named_parameters()), inputs).sum()
    after = [*model.named_parameters(), *model.named_buffers()]
    assert [(key, id(value), value.data_ptr()) for key, value in after] == [row[:3] for row in before]
    assert all(torch.equal(value, row[3]) for (_, value), row in zip(after, before, strict=True))
    assert [(key, id(child), type(child)) for key, child in model.named_modules()] == modules
    assert all(child.training for child in model.modules())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1 and not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_template_holds_no_weights(case: Any, name: str) -> None:
    model, inputs = case(name)
    backbone = backbone_of(model, hoist=False, device=CPU)
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    with torch.no_grad():
        expected = composed(backbone, weights, inputs)
        for value in [*model.parameters(), *model.buffers()]:
            value.fill_(torch.nan)
    assert torch.equal(composed(backbone, weights, inputs), expected)


def test_a_transformer_on_meta_runs_with_weights_from_elsewhere(case: Any) -> None:
    model, inputs = case("flux")
    weights = dict(model.named_parameters())
    expected = composed(backbone_of(model, hoist=True, device=CPU), weights, inputs)
    backbone = backbone_of(type(model).from_config(model.config).to("meta"), hoist=True, device=CPU)
    assert torch.equal(composed(backbone, weights, inputs), expected)


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_can_be_simulated(case: Any, name: str, hoist: bool) -> None:
    """Fake tensors on meta: a model of any size runs without memory, forward and backward."""
    real, inputs = case(name, torch.bfloat16)
    expected = real(**inputs, return_dict=False)[0]
    device = torch.device("meta")
    with FakeTensorMode() as mode:
        torch.set_default_dtype(torch.bfloat16)  # Module.to cannot convert fake parameters
        try:
            model = type(real).from_config(real.config)
        finally:
            torch.set_default_dtype(torch.float32)
        backbone = backbone_of(model, hoist=hoist, device=device)
        weights = {key: value.detach().to(device).requires_grad_() for key, value in model.named_parameters()}
        rows = {key: mode.from_tensor(value).to(device) for key, value in inputs.items()}
        output = composed(backbone, weights, rows)
        assert (output.shape, output.dtype, output.device) == (expected.shape, expected.dtype, device)
        found = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
        assert sum(value is not None for value in found) > len(found) // 2


def test_legs_with_the_same_ids_share_one_rope_table(case: Any) -> None:
    """While somebody holds it; not where ids have changed, nor one made in inference mode, which no graph may save."""
    model, inputs = case("flux")
    backbone = backbone_of(model, hoist=True, device=CPU)
    first = backbone.constants(inputs)
    assert all(a is b for a, b in zip(backbone.constants(dict(inputs)), first, strict=True))
    inputs["img_ids"][0, 1] += 1
    second = backbone.constants(inputs)
    assert not torch.equal(second[0], first[0])
    other = {**inputs, "img_ids": inputs["img_ids"].clone()}
    assert backbone.constants(other)[0] is not second[0]
    with torch.inference_mode():
        sampling = backbone.constants(inputs)
    assert sampling[0].is_inference() and not backbone.constants(inputs)[0].is_inference()


def test_a_subclass_is_its_family(case: Any) -> None:
    for name, scale in (("flux", 1.0), ("sd3", 1000.0)):
        model, _ = case(name)
        model.__class__ = type("Finetuned", (type(model),), {})
        assert backbone_of(model, hoist=False, device=CPU).timestep_scale == scale


def test_what_is_no_transformer_of_these_families_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear is not one of FluxTransformer2DModel, SD3.*SequentialBackbone"):
        backbone_of(nn.Linear(2, 2), hoist=False, device=CPU)


def test_weights_that_no_stage_reads_are_refused(case: Any) -> None:
    for name in ("flux", "sd3"):
        model, _ = case(name)
        model.image_proj = nn.Linear(2, 2)  # where an IP adapter hangs
        with pytest.raises(ValueError, match=r"2 parameters that no stage uses, first 'image_proj.weight': unload"):
            backbone_of(model, hoist=False, device=CPU)


def test_buffers_without_values_are_refused(case: Any) -> None:
    model, _ = case("sd3")
    with pytest.raises(ValueError, match=r"buffer pos_embed.pos_embed is on meta and has no values"):
        backbone_of(model.to("meta"), hoist=False, device=CPU)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "controlnet, flux": ("flux", {"controlnet_block_samples": [torch.ones(1)]}, "controlnet_block_samples is not supp"),
    "controlnet, sd3": ("sd3", {"block_controlnet_hidden_states": [1]}, "block_controlnet_hidden_states is not supp"),
    "attention arguments": ("flux", {"joint_attention_kwargs": {"scale": 0.5}}, "joint_attention_kwargs is not supp"),
    "skipped layers": ("sd3", {"skip_layers": [0]}, "skip_layers is not supported"),
    "unwanted guidance": ("flux", {"guidance": torch.ones(BATCH)}, "guidance is not supported"),
    "no guidance": ("flux-guidance", {"guidance": None}, "guidance is missing: .* needs hidden_states"),
    "no text": ("sd3", {"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
    "a scalar timestep": ("sd3", {"timestep": torch.tensor(500.0)}, "timestep is a number: .* one row a sample"),
    "a float timestep": ("flux", {"timestep": 0.5}, "timestep is a float: give .* a tensor"),
    "one timestep": ("flux", {"timestep": torch.ones(1)}, r"timestep has shape \(1,\) and hidden_states has 3 rows"),
    "positions": ("flux", {"img_ids": torch.zeros(4, 3)}, "img_ids has 4 rows and hidden_states has 6 tokens"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_stages_cannot_do_is_refused(case: Any, what: str) -> None:
    name, changed, message = REFUSED[what]
    model, inputs = case(name)
    with pytest.raises(ValueError, match=message) as raised:
        backbone_of(model, hoist=False, device=CPU).check_inputs(inputs | changed)
    assert "\n" not in str(raised.value)


def test_what_asks_for_nothing_is_dropped(case: Any) -> None:
    """FluxPipeline passes an empty dictionary; position ids with a batch dimension are deprecated, not wrong."""
    model, inputs = case("flux")
    backbone = backbone_of(model, hoist=False, device=CPU)
    nothing = {"joint_attention_kwargs": {}, "controlnet_blocks_repeat": False, "guidance": None}
    assert backbone.check_inputs(inputs | nothing).keys() == inputs.keys()
    batched = {key: inputs[key][None].expand(BATCH, -1, -1) for key in ("img_ids", "txt_ids")}
    found = backbone.check_inputs(inputs | batched)
    assert all(torch.equal(found[key], inputs[key]) for key in batched)
