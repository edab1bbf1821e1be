"""Mixtures of experts: all families whose layers have experts, through plan, surgery, masks, price and folders."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.calibration import calibration
from support.families import (
    EACH,
    KEPT_EXPERTS,
    LAYERS,
    MIXTURES,
    PLAIN,
    each_of,
    in_experts,
    logits_of,
    random_tokens,
    tiny_config,
    tiny_model,
)
from support.quantized import CPU, equal, settings
from transformers import AutoModelForCausalLM

from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.anatomy import (
    FAMILIES,
    architecture_of,
    decoder_layers,
    expert_parameters,
    num_linear_parameters,
    refuse_experts,
    unit_linears,
    unit_parameters,
    unit_shapes,
)
from qpruner.calibration.gradients import gradient_sums
from qpruner.callbacks import LoRAGuidedPruning, MixedPrecisionQuantization, StructuredPruning
from qpruner.callbacks.compression import Rehearsal
from qpruner.errors import UserError
from qpruner.experts import experts_to_linears_
from qpruner.memory import num_parameters
from qpruner.model_folder import build_skeleton, load_base, save_base
from qpruner.modeling_compressed import Experts
from qpruner.outline import outline_of
from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, Precision
from qpruner.precision import Leading
from qpruner.pricing import average_bits, price
from qpruner.pruning.compensation import compensate_, describe, places_among, shared_copy
from qpruner.pruning.criteria import Criterion
from qpruner.pruning.masks import UnitMasks
from qpruner.pruning.order import reorder_hidden_
from qpruner.pruning.scores import score_units
from qpruner.pruning.selection import SelectionConfig
from qpruner.pruning.surgery import apply_pruning_, narrow_
from qpruner.quantization.apply import LoftQSettings, linear_precisions, quantize_
from qpruner.quantization.bank import fill
from qpruner.quantization.calibrated_inputs import CalibratedConfig
from qpruner.quantization.packed import PackedLinear
from qpruner.search.parts import Structures
from qpruner.search.structure import StructureConfig

each_mixture = each_of(MIXTURES)
WHOLE = tuple(range(4 * EACH))
NF4, INT8, AFFINE = Precision("nf4", 4, 64), Precision("int8", 8), Precision("affine-double", 3, 32)
MIXED = [dict(zip(UNITS, (NF4, INT8, AFFINE, NF4), strict=True))] * LAYERS
HEAD_DIMS = {family: 8 if family == "olmoe" else 16 for family in MIXTURES}


def dense_plan(family: str) -> CompressionPlan:
    return CompressionPlan.dense(architecture_of(tiny_config(family)), None)


def stock_model(family: str) -> Any:
    """The model of transformers as it is made, with all its parameters drawn at random."""
    model = getattr(transformers, FAMILIES[family].model_class)(tiny_config(family)).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


@each_mixture
def test_experts_as_linears_compute_what_transformers_computes(family: str) -> None:
    stock = stock_model(family)
    model = experts_to_linears_(copy.deepcopy(stock))
    torch.testing.assert_close(logits_of(model), logits_of(stock), rtol=1e-4, atol=1e-4)
    assert num_parameters(model) == num_parameters(stock)
    state, tensors = model.state_dict(), stock.state_dict()
    if family == "gpt_oss":  # whose files hold the tensors as transformers does
        assert state.keys() == tensors.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    again = experts_to_linears_(stock_model(family))
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(state)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("family", PLAIN)
def test_other_models_are_left_alone(family: str) -> None:
    model = tiny_model(family)
    before = dict(model.named_modules())
    assert experts_to_linears_(model) is model and dict(model.named_modules()) == before


@each_mixture
def test_the_architecture_counts_channels_through_all_experts(family: str) -> None:
    expected = Architecture(family, 64, HEAD_DIMS[family], 2, (4,) * 3, (48,) * 3, (4,) * 3, 2)
    assert architecture_of(tiny_config(family)) == expected
    model = tiny_model(family)
    narrow_(model, KEPT_EXPERTS)
    narrow = replace(expected, kv_groups=(3, 1, 4), ffn_channels=(12, 24, 4), experts=(3, 2, 4))
    assert architecture_of(model.config) == narrow == dense_plan(family).keeping(KEPT_EXPERTS).widths
    assert [expected.channels_of_each(number) for number in range(3)] == [12] * 3
    assert [narrow.channels_of_each(number) for number in range(3)] == [4, 12, 1]


def test_layers_with_a_plain_ffn_among_others() -> None:
    config = tiny_config("qwen3_moe", mlp_only_layers=[1])
    architecture = architecture_of(config)
    assert (architecture.experts, architecture.ffn_channels) == ((4, 0, 4), (48, 48, 48))
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    kept = [KEPT_EXPERTS[0], ((1, 2), tuple(range(3, 48, 2))), KEPT_EXPERTS[2]]
    masks = UnitMasks(model)
    masks.keep([([*groups], [*channels]) for groups, channels in kept])
    masked = logits_of(model)
    masks.remove()
    narrow_(model, kept)
    torch.testing.assert_close(logits_of(model), masked, rtol=1e-4, atol=1e-4)
    assert architecture_of(model.config).experts == (3, 0, 4)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    outlined = {name: tuple(parameter.shape) for name, parameter in outline_of(model.config).named_parameters()}
    assert outlined == shapes
    assert {name: tuple(part.shape) for name, part in build_skeleton(model.config).named_parameters()} == shapes


@each_mixture
def test_units_are_those_of_every_expert(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT_EXPERTS)
    for number, units in enumerate(unit_linears(model)):
        assert len(units["gate_up"]) == 2 * (3, 2, 4)[number] and len(units["down"]) == (3, 2, 4)[number]
        shapes = {
            unit: tuple(tuple(model.get_submodule(name).weight.shape) for name in names)
            for unit, names in units.items()
        }
        assert unit_shapes(architecture_of(model.config), number) == shapes


@each_mixture
def test_one_unit_removed_takes_its_parameters(family: str) -> None:
    model = tiny_model(family)
    of_group, of_channel = unit_parameters(decoder_layers(model)[1])
    of_expert = expert_parameters(decoder_layers(model)[1])
    if family == "mixtral":
        assert (of_group, of_channel, of_expert) == ((32 + 16 + 16 + 32) * 64, 3 * 64, 12 * 3 * 64 + 64)
    if family == "gpt_oss":  # all biases, that of the router among them, and a sink for each query head
        assert of_group == 96 * 64 + 32 + 16 + 16 + 2
        assert (of_channel, of_expert) == (3 * 64 + 2, 12 * (3 * 64 + 2) + 64 + 64 + 1)
    total, linears = num_parameters(model), num_linear_parameters(model)
    whole = (range(4), WHOLE)
    narrow_(model, [whole, (range(1, 4), WHOLE), whole])
    assert total - num_parameters(model) == of_group
    channels = in_experts({0: range(11), 1: range(1, 12), 2: (0, *range(2, 12)), 3: range(11)})
    narrow_(model, [whole, (range(3), channels), whole])
    assert total - num_parameters(model) == of_group + 4 * of_channel
    narrow_(model, [whole, (range(3), range(33)), whole])  # without the last expert, of 11 channels each by now
    router = 65 if family == "gpt_oss" else 64
    assert total - num_parameters(model) == of_group + 3 * of_channel + of_expert
    assert linears - num_linear_parameters(model) <= of_group + 3 * of_channel + of_expert - router


@each_mixture
def test_what_is_masked_equals_what_is_narrowed(family: str) -> None:
    model = tiny_model(family)
    whole, masks = logits_of(model), UnitMasks(model)
    masks.keep([([*groups], [*channels]) for groups, channels in KEPT_EXPERTS])
    masked = logits_of(model)
    masks.remove()
    assert torch.equal(logits_of(model), whole) and (masked - whole).abs().max() > 0.1
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    narrow_(model, KEPT_EXPERTS)
    torch.testing.assert_close(logits_of(model), masked, rtol=1e-4, atol=1e-4)
    gate, _, down = (f"mlp.experts.{{}}.{name}.weight" for name in FAMILIES[family].mixture.names)  # type: ignore[union-attr]
    third, expert = "model.layers.0.", model.model.layers[0].mlp.experts[1]  # which was number 2
    assert torch.equal(expert.get_parameter(gate[15:]), dense[third + gate.format(2)][1:5])
    assert torch.equal(expert.get_parameter(down[15:]), dense[third + down.format(2)][:, 1:5])
    router = FAMILIES[family].mixture.router  # type: ignore[union-attr]
    assert torch.equal(
        model.get_parameter(f"model.layers.1.{router}.weight"), dense[f"model.layers.1.{router}.weight"][[1, 3]]
    )


@each_mixture
def test_dead_experts_and_channels_can_go_unnoticed(family: str) -> None:
    """No token is sent to expert 1 of the first layer, and a third of all channels puts out nothing."""
    model = tiny_model(family)
    router = model.model.layers[0].get_submodule(FAMILIES[family].mixture.router)  # type: ignore[union-attr]
    chosen: list[torch.Tensor] = []
    router.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
    with torch.no_grad():
        hidden: list[torch.Tensor] = []
        handle = router.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
        logits_of(model)
        handle.remove()
        # The row that is best at telling its inputs from none sends nothing there.
        rows, targets = hidden[0].double(), torch.full((len(hidden[0]), 1), -50.0, dtype=torch.float64)
        router.weight[1] = torch.linalg.lstsq(rows, targets).solution[:, 0].float()
        for layer in decoder_layers(model):
            for *_, down in layer.channel_weights_of_each:
                down.linear.weight[:, 8:] = 0
    expected = logits_of(model)
    assert not (chosen[-1] == 1).any() and (chosen[0] == 1).any()
    channels = {expert: range(8) for expert in range(4)}
    without = {expert: places for expert, places in channels.items() if expert != 1}
    narrow_(model, [(range(4), in_experts(without)), *[(range(4), in_experts(channels))] * 2])
    assert len(model.model.layers[0].mlp.experts) == 3
    if family == "mixtral" or family == "gpt_oss" or family == "qwen3_moe":  # whose weights add up to 1
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    else:  # OLMoE's are shares of all experts, of which the dead one had next to nothing
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-3, atol=1e-3)


@each_mixture
def test_experts_and_channels_come_in_the_order_of_the_plan(family: str) -> None:
    shuffled = [(groups[::-1], channels[::-1]) for groups, channels in KEPT_EXPERTS]
    one, other = tiny_model(family), tiny_model(family)
    apply_pruning_(one, dense_plan(family).keeping(KEPT_EXPERTS))
    apply_pruning_(other, dense_plan(family).keeping(shuffled))
    torch.testing.assert_close(logits_of(other), logits_of(one), rtol=1e-4, atol=1e-4)
    narrow_(one, [(range(groups)[::-1], range(channels)[::-1]) for groups, channels in ((3, 12), (1, 24), (4, 4))])
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    places = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    before = logits_of(one)
    reorder_hidden_(one, places)
    torch.testing.assert_close(logits_of(one), before, rtol=1e-4, atol=1e-4)


@each_mixture
def test_a_plan_comes_back_from_its_file(family: str) -> None:
    plan = dense_plan(family).keeping(KEPT_EXPERTS).with_precision(MIXED)
    assert CompressionPlan.from_json(plan.to_json()) == plan
    content = json.loads(plan.to_json())
    assert content["architecture"]["experts"] == [4, 4, 4] and content["architecture"]["experts_per_token"] == 2
    assert content["layers"][0]["ffn_channels"] == "0 3-4 11 25-28 44-47"
    assert plan.columns(0) == {"qkv": 64, "o": 3 * 2 * HEAD_DIMS[family], "gate_up": 64, "down": 4}


def test_a_plan_of_a_plain_family_has_no_word_of_experts() -> None:
    assert "experts" not in CompressionPlan.dense(architecture_of(tiny_config("llama")), None).to_json()


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (in_experts({0: (0, 1), 1: (0,)}), r"experts keep different numbers of FFN channels \(\{0: 2, 1: 1\}\)"),
        ((0, 12, 1, 13), "the FFN channels of an expert do not stand together"),
        (in_experts({2: range(12)}), "Layer 1 keeps 1 experts, but each token is sent to 2"),
        ((*range(40), 48), "Layer 1 keeps FFN channels up to 48; it has 0 to 47"),
    ],
)
def test_plans_that_no_mixture_can_be(channels: tuple[int, ...], message: str) -> None:
    plan = dense_plan("mixtral")
    layers = [plan.layers[0], replace(plan.layers[1], ffn_channels=channels), plan.layers[2]]
    with pytest.raises(UserError, match=message):
        replace(plan, layers=tuple(layers))


def test_what_experts_do_not_offer() -> None:
    led = Precision("affine", 4, 32, Leading(2, INT8))
    precision = [{**dict.fromkeys(UNITS, DENSE), "down": led}] * LAYERS
    with pytest.raises(UserError, match="In layer 0 leading columns of down have a precision of their own"):
        dense_plan("mixtral").with_precision(precision)
    dense_plan("mixtral").with_precision([{**dict.fromkeys(UNITS, DENSE), "gate_up": led}] * LAYERS)
    with pytest.raises(UserError, match="Layer 0 has 2 experts, but each token is sent to 3"):
        Architecture("mixtral", 64, 16, 2, (4,), (48,), (2,), 3)
    with pytest.raises(UserError, match="Layer 0 has 50 FFN channels in 4 experts"):
        Architecture("mixtral", 64, 16, 2, (4,), (50,), (4,), 2)
    with pytest.raises(UserError, match="has a number of experts, or 0, for each of its layers"):
        Architecture("mixtral", 64, 16, 2, (4, 4), (48, 48), (4,), 2)


def folder(path: Path, family: str, plan: CompressionPlan) -> Any:
    model = tiny_model(family)
    apply_pruning_(model, plan)
    quantize_(model, plan, None, device=CPU)
    save_base(path, model, plan, base_name="dense", tokenizer=None)
    return model


def plan_of(family: str, kind: str) -> CompressionPlan:
    plan = dense_plan(family)
    if kind == "uniform":
        return plan.keeping([((0, 1, 2), KEPT_EXPERTS[0][1])] * LAYERS)
    if "pruned" in kind:
        plan = plan.keeping(KEPT_EXPERTS)
    return plan.with_precision(MIXED, embedding=INT8, head=INT8) if "packed" in kind else plan


KINDS = ["dense", "uniform", "pruned", "packed", "pruned and packed"]


@each_mixture
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_costs_its_price_and_gives_the_model_back(tmp_path: Path, family: str, kind: str) -> None:
    plan = plan_of(family, kind)
    model = folder(tmp_path / "model", family, plan)
    tensors: dict[str, Any] = {}
    for file in (tmp_path / "model").glob("*.safetensors"):
        tensors |= load_file(file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size == price(tiny_model(family), plan).total == price(outline_of(tiny_config(family)), plan).total
    priced = price(tiny_model(family), plan)
    assert average_bits(plan, 4) == pytest.approx(priced.average_bits)
    again, expected = load_base(tmp_path / "model").network, logits_of(model)
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-5, atol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)
    by_transformers_alone = kind == "dense" or (kind == "uniform" and family != "olmoe")
    assert type(loaded).__name__.startswith("Compressed") != by_transformers_alone
    if by_transformers_alone:
        names = {"mixtral": "block_sparse_moe.experts.0.w1.weight", "gpt_oss": "mlp.experts.gate_up_proj"}
        assert f"model.layers.0.{names.get(family, 'mlp.experts.0.gate_proj.weight')}" in tensors


@each_mixture
def test_cached_generation_is_the_same(tmp_path: Path, family: str) -> None:
    model = folder(tmp_path / "model", family, plan_of(family, "pruned and packed"))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    tokens = random_tokens()
    generated = model.generate(tokens, **options)
    assert torch.equal(generated, model.generate(tokens, use_cache=False, **options))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert torch.equal(generated, loaded.generate(tokens, **options))


@each_mixture
def test_only_experts_in_use_are_unpacked(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    quantize_(model, plan_of(family, "packed"), None, device=CPU)
    unpacked: list[PackedLinear] = []
    unpack = PackedLinear.unpack

    def counted(linear: PackedLinear, dtype: torch.dtype) -> torch.Tensor:
        unpacked.append(linear)
        return unpack(linear, dtype)

    monkeypatch.setattr(PackedLinear, "unpack", counted)
    chosen: dict[int, set[int]] = {}
    for number, block in enumerate(model.model.layers):
        router = block.get_submodule(FAMILIES[family].mixture.router)  # type: ignore[union-attr]
        router.register_forward_hook(lambda m, i, output, n=number: chosen.update({n: {*output[2].flatten().tolist()}}))
    logits_of(model, random_tokens(1, 1))
    used = {id(linear) for linear in unpacked}
    for number, block in enumerate(model.model.layers):
        assert isinstance(block.mlp.experts, Experts) and len(chosen[number]) == 2
        for expert, module in enumerate(block.mlp.experts):
            linears = [part for part in module.modules() if isinstance(part, PackedLinear)]
            assert len(linears) == 3
            assert {id(linear) in used for linear in linears} == {expert in chosen[number]}


@each_mixture
def test_a_token_multiplies_with_the_experts_that_it_is_sent_to(family: str) -> None:
    plan = plan_of(family, "pruned")
    priced = price(tiny_model(family), plan)
    of_experts = sum(3 * 64 * channels for channels in plan.widths.ffn_channels)
    met = 3 * 64 * 2 * (4 + 12 + 1)  # channels of two experts in each layer
    assert priced.multiply_adds == priced.weights - of_experts + met
    assert (
        price(tiny_model("llama"), CompressionPlan.dense(architecture_of(tiny_config("llama")), None)).idle_weights == 0
    )


def test_adapters_are_on_attention_alone() -> None:
    for family in MIXTURES:
        model = tiny_model(family)
        wrapped = attach_adapters(model, LoRAConfig(r=2), seed=0)
        adapted = {name.partition(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}
        ends = {name.rpartition(".")[2] for name in adapted}
        assert len(adapted) == 4 * LAYERS and ends == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert wrapped.peft_config["default"].exclude_modules is not None
    mixed = attach_adapters(tiny_model("qwen3_moe", mlp_only_layers=[1]), LoRAConfig(r=2), seed=0)
    adapted = {name for name, _ in mixed.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 4 * LAYERS + 3  # and on the plain FFN, whose linears are called as those of experts
    with pytest.raises(UserError, match="w1 match no linear"):
        attach_adapters(tiny_model("mixtral"), LoRAConfig(r=2, target_modules=["w1"]), seed=0)


@each_mixture
@pytest.mark.parametrize("start", [settings(), None], ids=["LoftQ", "plain"])
def test_a_bank_holds_experts_and_assembles_plans(family: str, start: LoftQSettings | None) -> None:
    model, plan = tiny_model(family), dense_plan(family).with_precision(MIXED)
    fresh = copy.deepcopy(model)
    factors = quantize_(fresh, plan, start, device=CPU)
    assert factors.keys() == ({name for name in linear_precisions(fresh, plan) if "attn" in name} if start else set())
    bank = fill(model, (NF4, INT8, AFFINE), start, device=CPU)
    assembled = bank.assemble_(model, plan)
    assert assembled.keys() == factors.keys() and equal(assembled, factors)
    expected = fresh.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@each_mixture
def test_gradients_are_those_of_autograd_also_of_experts_without_tokens(family: str) -> None:
    model, tokens = tiny_model(family).requires_grad_(False), random_tokens(3, 5)
    linears = {
        f"{number}.{name}": linear
        for number, layer in enumerate(decoder_layers(model))
        for name, linear in layer.linears.items()
    }
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def consume(name: str, gradient: torch.Tensor, squared: torch.Tensor | None) -> torch.Tensor:
        assert squared is not None
        seen[name] = gradient, squared
        return gradient.double().flatten()[:1]

    gradient_sums(model, linears, calibration(3, tokens), consume, sizes=dict.fromkeys(linears, 1), per_sequence=True)
    weights = [linear.weight.requires_grad_() for linear in linears.values()]
    expected = [torch.zeros_like(weight) for weight in weights], [torch.zeros_like(weight) for weight in weights]
    for sequence in tokens.split(1):
        logits = model(input_ids=sequence, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], sequence[0, 1:])
        for place, found in enumerate(torch.autograd.grad(loss, weights, allow_unused=True)):
            if found is not None:
                expected[0][place].add_(found / len(tokens))
                expected[1][place].add_(found.square() / len(tokens))
    for name, gradient, squared in zip(linears, *expected, strict=True):
        torch.testing.assert_close(seen[name][0], gradient, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(seen[name][1], squared, rtol=1e-3, atol=1e-5)


@each_mixture
def test_experts_score_by_the_tokens_that_reach_them(family: str) -> None:
    """The gates of a sequence's channels, by autograd; an expert that no token reaches scores nothing."""
    model, tokens = tiny_model(family).requires_grad_(False), random_tokens(4, 5)
    downs = [part.linear for layer in decoder_layers(model) for part in layer.outputs[1:]]
    squares = [torch.zeros(EACH) for _ in downs]
    for sequence in tokens.split(1):
        gates = [torch.ones(EACH, requires_grad=True) for _ in downs]
        handles = [
            down.register_forward_pre_hook(lambda _, inputs, gate=gate: (inputs[0] * gate,))
            for down, gate in zip(downs, gates, strict=True)
        ]
        logits = model(input_ids=sequence, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], sequence[0, 1:])
        for place, found in enumerate(torch.autograd.grad(loss, gates, allow_unused=True)):
            if found is not None:
                squares[place] += found.square() / len(tokens)
        for handle in handles:
            handle.remove()
    scores = score_units(model, "fisher", "sum", calibration(2, tokens), seed=0)
    found = torch.cat([score.ffn_channels for score in scores]).float()
    torch.testing.assert_close(found, torch.cat(squares), rtol=1e-3, atol=1e-6)
    for criterion in get_args(Criterion):
        if criterion == "reconstruction":
            with pytest.raises(UserError, match="'reconstruction' does not work on mixtures of experts"):
                score_units(model, criterion, "sum", calibration(2, tokens), seed=0)
        else:
            scores = score_units(model, criterion, "sum", calibration(2, tokens), seed=0)
            assert [(len(score.kv_groups), len(score.ffn_channels)) for score in scores] == [(4, 48)] * LAYERS
            assert all((part >= 0).all() for score in scores for part in (score.kv_groups, score.ffn_channels))


def test_a_mixture_fluctuates_as_one_weight() -> None:
    model = tiny_model("mixtral").requires_grad_(False)
    scores = score_units(model, "flap", "sum", calibration(2), seed=0)[0].ffn_channels.view(4, EACH)
    assert len({round(float(total), 3) for total in scores.sum(1)}) == 4  # each by itself they would all be alike


def test_what_does_not_know_experts_says_what_does() -> None:
    model = tiny_model("mixtral")
    rehearsal = Rehearsal(tiny_model("mixtral"), LoRAConfig())
    with pytest.raises(UserError, match=r"LoRAGuidedPruning.* as mixtral is\. Use StructuredPruning\."):
        LoRAGuidedPruning(0.2).check(rehearsal)
    with pytest.raises(UserError, match=r"calibrated does not work on mixtures .* leave calibrated out"):
        MixedPrecisionQuantization(bits=[4, 4, 4], calibrated=CalibratedConfig()).check(rehearsal)
    with pytest.raises(UserError, match="The criterion 'reconstruction'.* Use another, such as fisher"):
        StructuredPruning(0.2, "reconstruction").check(rehearsal)
    with pytest.raises(UserError, match=r"search\.structure does not work on mixtures .* leave search\.structure out"):
        Structures(model, dense_plan("mixtral"), StructureConfig(), SelectionConfig(), LoRAConfig())
    with pytest.raises(UserError, match="joint does not work on mixtures"):
        refuse_experts(model.config, "joint", "another")
    refuse_experts(tiny_model("llama").config, "joint", "another")


@each_mixture
def test_compensation_changes_attention_and_leaves_experts(family: str) -> None:
    dense = tiny_model(family).requires_grad_(False)
    model = shared_copy(dense)
    plan = dense_plan(family)
    narrow_(model, KEPT_EXPERTS)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = calibration(2, random_tokens(48, 16))
    fits = compensate_(model, dense, places_among(plan, plan.keeping(KEPT_EXPERTS)), text, "sequential")
    assert list(fits) == ["0.o", "1.o", "2.o"] and fits["1.o"].changes
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "model.layers.1.self_attn.o_proj.weight" in changed
    assert all("o_proj" in name for name in changed)
    assert describe(fits, 768).endswith("; experts stay as they are.")
