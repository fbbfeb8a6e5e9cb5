"""Blocks on the fused kernels: as near to float64 as the plain blocks, in less memory, and refused where unknown."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leapalign.engine.backbones import backbone_of
from leapalign.engine.backbones.attention import JointAttention, check_attention
from leapalign.engine.planning.planner import Planner
from leapalign.engine.planning.stage_costs import StageCosts
from leapalign.engine.planning.workload import Workload
from tests.kernels.interpreter import run_interpreted

CPU = torch.device("cpu")
WIDTH, HEADS = 64, 4


def flux_block(kind: str) -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock

    make = FluxTransformerBlock if kind == "double" else FluxSingleTransformerBlock
    return make(WIDTH, HEADS, WIDTH // HEADS)


def sd3_block(kind: str) -> nn.Module:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(
        WIDTH, HEADS, WIDTH // HEADS, qk_norm="rms_norm", use_dual_attention=kind == "dual",
        context_pre_only=kind == "last",
    )  # fmt: skip


BLOCKS: dict[str, tuple[Callable[[str], nn.Module], str]] = {
    "flux double": (flux_block, "double"),
    "flux single": (flux_block, "single"),
    "sd3": (sd3_block, "joint"),
    "sd3 with two attentions": (sd3_block, "dual"),
    "sd3 at the end": (sd3_block, "last"),
}


def gradients(block: nn.Module, fused: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and all gradients of a block in this dtype, its values those of bfloat16; as float64."""
    from leapalign.engine.backbones.attention import set_processors
    from leapalign.engine.backbones.fused import joint_block, single_block

    block = copy.deepcopy(block).to(dtype)
    flux = "Flux" in type(block).__name__
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().to(dtype).requires_grad_()

    inputs = {"image": normal(2, 24, WIDTH), "text": normal(2, 7, WIDTH), "temb": normal(2, WIDTH)}
    angles = torch.randn(31, WIDTH // HEADS // 2, generator=generator).repeat_interleave(2, -1)
    rope = (angles.cos(), angles.sin()) if flux else None
    if fused:
        set_processors(block, fused=True, text_first=flux)
        run = single_block if hasattr(block, "proj_mlp") else joint_block
        outputs = run(block, inputs["image"], inputs["text"], inputs["temb"], rope)
    else:
        more = {"image_rotary_emb": rope} if flux else {}
        outputs = block(
            hidden_states=inputs["image"], encoder_hidden_states=inputs["text"], temb=inputs["temb"], **more
        )
    found = {f"output {i}": each for i, each in enumerate(outputs) if each is not None}
    cotangents = [torch.randn(each.shape, generator=generator).bfloat16().to(dtype) for each in found.values()]
    targets = inputs | dict(block.named_parameters())
    values = torch.autograd.grad(list(found.values()), list(targets.values()), cotangents, allow_unused=True)
    found |= {name: value for name, value in zip(targets, values, strict=True) if value is not None}
    return {name: value.detach().double() for name, value in found.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_in_bfloat16_gradients_with_kernels_equal_those_without_at_rounding_level(name: str) -> None:
    """Both differ from float64 because bfloat16 rounds; the fused block rounds at fewer places.

    A tensor of a block is off by a few half-ulps (2^-9 relative, random signs) for each of the R rounded tensors on
    the way to it, so by about 2^-9 sqrt(R) of its norm; R < 64 for what a block computes forward and backward. Where
    terms nearly cancel, as in softmax's derivatives, the loss of digits is the same for both: 2 x the plain error.
    """
    make, kind = BLOCKS[name]
    torch.manual_seed(1)
    block = make(kind)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.bfloat16().float()
    exact = gradients(block, False, torch.float64)
    plain, fused = (gradients(block, fused, torch.bfloat16) for fused in (False, True))
    assert exact.keys() == plain.keys() == fused.keys()

    def error(found: dict[str, Tensor], key: str) -> float:
        return float((found[key] - exact[key]).norm() / (exact[key].norm() or 1))  # text queries at the end: all 0

    bound = 2.0**-9 * 64**0.5
    worse = {key: (error(fused, key), error(plain, key)) for key in exact}
    beyond = {key: pair for key, pair in worse.items() if pair[0] > max(bound, 2 * pair[1])}
    assert not beyond
    # All tensors together, the fused block is the better one.
    total_fused, total_plain = (sum(pair[i] ** 2 for pair in worse.values()) for i in (0, 1))
    assert total_fused <= total_plain


def test_under_the_interpreter_a_whole_models_gradients_are_those_of_the_plain_one() -> None:
    run_interpreted("check_blocks")


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_fused_blocks_take_less_memory(make_transformer: Any, family: str) -> None:
    """Counted on meta: what the plain arithmetic saves between its operators is gone."""
    workload = Workload(batch=1, resolution=64, text_tokens=8)
    model = make_transformer(family, torch.bfloat16).to("meta")
    costs = {}
    for kernels in ("torch", "triton"):
        planner = Planner(model, Workload(**{**vars(workload), "kernels": kernels}))
        assert isinstance(planner.costs, StageCosts)
        costs[kernels] = [planner.costs.backward(part, 1, params=True).device_bytes for part in planner.costs.kinds]
        assert {plan.kernels for plan in planner.plans()} == {kernels}
    pairs = list(zip(costs["triton"], costs["torch"], strict=True))
    assert pairs[0][0] == pairs[0][1]  # the stem has nothing to fuse
    assert all(fused < plain for fused, plain in pairs[1:])


def chunked(model: Any) -> None:
    model.transformer_blocks[0].set_chunk_feed_forward(2)


def with_another_processor(model: Any) -> None:
    class Other:
        def __call__(self) -> None: ...

    model.transformer_blocks[0].attn.processor = Other()


def with_affine_norm(model: Any) -> None:
    model.transformer_blocks[0].norm2 = nn.LayerNorm(8)


def with_another_eps(model: Any) -> None:
    model.transformer_blocks[0].attn.norm_q.eps = 1e-3


@pytest.mark.parametrize(
    ("family", "change", "told"),
    [
        ("sd3", chunked, "transformer_blocks.0 runs its feed-forward in chunks"),
        ("flux", with_another_processor, "transformer_blocks.0.attn runs on a Other"),
        ("flux", with_affine_norm, "transformer_blocks.0.norm2 has weights"),
        ("flux", with_another_eps, "norm_q/norm_k of transformer_blocks.0.attn have different eps"),
    ],
)
def test_blocks_that_the_kernels_do_not_know_are_named(
    make_transformer: Any, family: str, change: Callable[[Any], None], told: str
) -> None:
    model = make_transformer(family)
    change(model)
    with pytest.raises(ValueError, match=f"{told}: choose kernels = torch"):
        backbone_of(model, hoist=True, device=CPU, kernels="triton")
    assert not backbone_of(model, hoist=True, device=CPU, kernels="auto").fused


@pytest.mark.parametrize(("family", "names"), [("flux", {"native"}), ("sd3", {"native"})])
def test_an_attention_backend_reaches_every_block(make_transformer: Any, family: str, names: set[str]) -> None:
    model = make_transformer(family)
    backbone = backbone_of(model, hoist=False, device=CPU, kernels="triton", attention="native")
    found = [
        module.processor._attention_backend
        for stage in backbone.blocks
        for module in stage.run.__self__.modules()  # type: ignore[attr-defined]
        if getattr(module, "processor", None) is not None
    ]
    assert len(found) >= len(backbone.blocks)
    assert set(found) == names
    own = [module.processor for module in model.modules() if getattr(module, "processor", None) is not None]
    assert all(getattr(processor, "_attention_backend", None) is None for processor in own)  # the user's model


def test_sd3_through_the_dispatcher_has_the_bits_of_its_own_processor() -> None:
    torch.manual_seed(5)
    block: Any = sd3_block("dual")
    image, text = torch.randn(2, 24, WIDTH), torch.randn(2, 7, WIDTH)
    for attn, given in ((block.attn, (image, text)), (block.attn2, (image,))):
        expected = attn(*given)
        attn.processor = JointAttention(fused=False, text_first=False)
        found = attn(*given)
        pairs = zip(found, expected, strict=True) if len(given) == 2 else [(found, expected)]
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_backend_that_cannot_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from leapalign.engine.backbones import attention

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'leapalign\[flash-attn\]', or choose attention = native"):
        check_attention("flash", gpu)
    with pytest.raises(ValueError, match=r"attention = xformers needs xformers, which is not installed"):
        check_attention("xformers", gpu)
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="attention = cudnn runs on a CUDA GPU, not on cpu: choose attention = native"):
        check_attention("cudnn", CPU)
    with pytest.raises(ValueError, match="attention = flash has no kernel for float32: choose weight_dtype = bf16"):
        check_attention("flash", gpu, torch.float32)
    with pytest.raises(ValueError, match="attention = math is unknown: choose auto, native, cudnn, flash, xformers"):
        check_attention("math", CPU)
    for backend in ("auto", "native"):
        check_attention(backend, CPU, torch.float32)
    check_attention("flash", gpu, torch.bfloat16)
