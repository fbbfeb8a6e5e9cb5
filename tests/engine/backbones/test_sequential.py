"""Somebody else's model in stages: a causal language model with a tied head, and a plain list of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from leapalign.engine.backbones import SequentialBackbone
from leapalign.engine.model import StreamedModel
from leapalign.engine.plan import MemoryPlan

CPU = torch.device("cpu")
VOCABULARY, TOKENS, BATCH = 19, 7, 3


def llama(tied: bool = True, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(60)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def position_and_mask(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rope = model.model.rotary_emb(torch.empty(0, dtype=model.dtype, device=ids.device), positions)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return rope, causal & inputs["attention_mask"][:, None, None].bool()


def llama_backbone(model: LlamaForCausalLM, **given: Any) -> SequentialBackbone:
    return SequentialBackbone(
        model,
        model.model.layers,
        stem=lambda m, inputs: (m.model.embed_tokens(inputs["input_ids"]),),
        block=lambda layer, carried, c: (layer(*carried, position_embeddings=c[0], attention_mask=c[1]),),
        head=lambda m, carried, c: m.lm_head(m.model.norm(*carried)),
        constants=position_and_mask,
        device=CPU,
        **given,
    )


def text() -> dict[str, Tensor]:
    """Token ids and a mask by which no two rows are equally long."""
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(61))
    lengths = torch.arange(TOKENS - BATCH + 1, TOKENS + 1)
    return {"input_ids": ids, "attention_mask": (torch.arange(TOKENS) < lengths[:, None]).long()}


def composed(backbone: SequentialBackbone, weights: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Tensor:
    inputs = backbone.check_inputs(inputs)
    constants = backbone.microbatch_constants(backbone.constants(inputs), inputs)
    carried = backbone.stem.run({name: weights[name] for name in backbone.stem.parameters}, inputs)
    for block in backbone.blocks:
        carried = block.run({name: weights[name] for name in block.parameters}, carried, None, constants)
    output: Tensor = backbone.head.run(
        {name: weights[name] for name in backbone.head.parameters}, carried, None, constants
    )
    return output


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_causal_language_model(worst_error: Any, tied: bool, named: bool) -> None:
    model, inputs = llama(tied), text()
    embedding = "model.embed_tokens"
    prefixes = {
        "stem_parameters": [embedding],
        "head_parameters": ["model.norm", embedding if tied else "lm_head"],
    }
    backbone = llama_backbone(model, **(prefixes if named else {}))
    weights = dict(model.named_parameters())
    expected, found = model(**inputs).logits, composed(backbone, weights, inputs)
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(expected)

    def gradients(output: Tensor) -> dict[str, Tensor]:
        values = torch.autograd.grad(output, list(weights.values()), cotangent)
        return dict(zip(weights, values, strict=True))

    error, where = worst_error(gradients(found), gradients(expected))
    assert error <= 1, f"{error:.3g} x tolerance at {where}"


@pytest.mark.parametrize(
    "plan", [MemoryPlan(), MemoryPlan(microbatch=2, every=2, slots=3), MemoryPlan(microbatch=None, resident="all")]
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_streamed_language_model_has_autograds_gradients(tied: bool, plan: MemoryPlan, worst_error: Any) -> None:
    """A foreign training loop: cross entropy of the next token, two losses added up."""
    plain, inputs = llama(tied, torch.float32), text()
    model = StreamedModel(llama_backbone(llama(tied, torch.float32)), plan)
    targets = inputs["input_ids"].roll(-1, 1).flatten()
    for start in (0, 1):
        given = {name: value[start:] for name, value in inputs.items()}
        for logits in (plain(**given).logits, model(**given)):
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[start * TOKENS :])
            loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    error, where = worst_error({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    assert error <= 1, f"{error:.3g} x tolerance at {where}"
    model.close()


def test_a_tied_weight_has_one_name_in_stem_and_head() -> None:
    backbone = llama_backbone(llama(tied=True))
    outside = ("model.embed_tokens.weight", "model.norm.weight")
    assert backbone.stem.parameters == backbone.head.parameters == outside
    assert [block.name for block in backbone.blocks] == [f"model.layers.{index}" for index in range(3)]
    assert not {name for block in backbone.blocks for name in block.parameters} & set(outside)


def test_constants_are_those_of_the_rows_that_run() -> None:
    """Rows padded to different lengths: each has its own mask."""
    model, inputs = llama(dtype=torch.float64), text()
    backbone, weights = llama_backbone(model), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(**inputs).logits
        for row in range(BATCH):
            rows = {name: value[row : row + 1] for name, value in inputs.items()}
            found = composed(backbone, weights, rows)
            # LlamaRMSNorm rounds to float32, so a last bit may become 6e-8
            torch.testing.assert_close(found, expected[row : row + 1], rtol=1e-5, atol=1e-6)


def test_the_example_of_the_docstring() -> None:
    model, ids = llama(), text()["input_ids"]

    def rope(m: Any, inputs: Mapping[str, Any]) -> Any:
        positions = torch.arange(inputs["input_ids"].shape[1], device=CPU)[None]
        return m.model.rotary_emb(torch.empty(0, dtype=m.dtype, device=CPU), positions)

    backbone = SequentialBackbone(
        model,
        model.model.layers,
        stem=lambda m, inputs: m.model.embed_tokens(inputs["input_ids"]),
        block=lambda layer, carried, rope: layer(*carried, position_embeddings=rope),
        head=lambda m, carried, rope: m.lm_head(m.model.norm(*carried)),
        constants=rope,
        device=CPU,
    )
    assert torch.equal(composed(backbone, dict(model.named_parameters()), {"input_ids": ids}), model(ids).logits)


class Pair(nn.Module):
    """Carries two tensors; the last one drops the second."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.mix, self.last = nn.Linear(4, 4), last

    def forward(self, x: Tensor, y: Tensor) -> Any:
        x = x + self.mix(y).tanh()
        return x if self.last else (x, y * x)


class Flow(nn.Module):
    timestep_scale = 10.0
    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.blocks = nn.Sequential(Pair(False), Pair(False), Pair(True))
        self.register_buffer("shift", torch.tensor(0.25))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x, y = hidden_states * self.scale, hidden_states + timestep[:, None] * self.shift
        x, y = self.blocks[0](x, y)
        x, y = self.blocks[1](x, y)
        x = self.blocks[2](x, y)
        return x * self.scale


def flow_backbone(model: Flow, **given: Any) -> SequentialBackbone:
    return SequentialBackbone(
        model,
        model.blocks,
        stem=lambda m, i: (i["hidden_states"] * m.scale, i["hidden_states"] + i["timestep"][:, None] * m.shift),
        head=lambda m, carried, constants: carried[0] * m.scale,
        device=CPU,
        **given,
    )


def test_blocks_are_called_with_what_is_carried() -> None:
    torch.manual_seed(62)
    model = Flow()
    backbone = flow_backbone(model)
    inputs = {"hidden_states": torch.randn(BATCH, 4), "timestep": torch.rand(BATCH), "guidance": None}
    found = composed(backbone, dict(model.named_parameters()), inputs)
    assert torch.equal(found, model(inputs["hidden_states"], inputs["timestep"]))
    assert backbone.timestep_scale == 10.0 and backbone.condition is None and backbone.condition_inputs == ()


@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_share_a_weight_share_its_name(whole: bool) -> None:
    """One linear in the first and the last block, or one block in two places."""
    model: Any = Flow()
    if whole:
        model.blocks[1] = model.blocks[0]
    else:
        model.blocks[2].mix = model.blocks[0].mix
    backbone = flow_backbone(model)
    twin = backbone.blocks[1 if whole else 2]
    assert len(backbone.blocks) == 3 and twin.name != backbone.blocks[0].name
    assert backbone.blocks[0].parameters == twin.parameters == ("blocks.0.mix.weight", "blocks.0.mix.bias")
    inputs = {"hidden_states": torch.randn(BATCH, 4), "timestep": torch.rand(BATCH)}
    assert torch.equal(composed(backbone, dict(model.named_parameters()), inputs), model(**inputs))


def test_the_model_is_not_touched() -> None:
    model = llama(tied=True)
    before = [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]
    backbone = llama_backbone(model.train())
    with torch.no_grad():
        composed(backbone, {name: 2 * value for name, value in model.named_parameters()}, text())
    assert [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)] == before
    assert len(model.model.layers) == 3 and all(child.training for child in model.modules())


def test_blocks_must_be_a_list_of_the_model() -> None:
    model = Flow()
    for blocks in (nn.ModuleList([Pair(True)]), nn.ModuleList()):
        with pytest.raises(ValueError, match=rf"blocks \({len(blocks)} of them\) is not a list inside Flow"):
            SequentialBackbone(model, blocks, stem=lambda m, i: (), head=lambda m, c, k: c[0], device=CPU)


def test_prefixes_must_name_all_weights_and_nothing_else() -> None:
    with pytest.raises(
        ValueError, match=r"head_parameters: no weight outside the blocks is called 'model.nor'; they are"
    ):
        llama_backbone(llama(), head_parameters=["model.nor"])
    with pytest.raises(ValueError, match=r"1 parameters that no stage uses, first 'model.norm.weight'"):
        llama_backbone(llama(), stem_parameters=["model.embed_tokens"], head_parameters=["model.embed_tokens"])
