import math
from collections.abc import Sequence
from typing import Any, get_args

import pytest
import torch
from support.families import PLAIN, each_of, random_tokens, tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.anatomy import decoder_layers
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.processes import Processes
from qpruner.pruning.criteria import Aggregate, Criterion, WeightCriterion
from qpruner.pruning.reconstruction import greedy_removal
from qpruner.pruning.scores import LayerScores, needs_text, score_units

CRITERIA: Sequence[Criterion] = get_args(Criterion)
AGGREGATES: Sequence[Aggregate] = get_args(Aggregate)
GROUPS, CHANNELS, VOCAB = 2, 48, 64

each_criterion = pytest.mark.parametrize("criterion", CRITERIA)


@pytest.fixture
def model() -> Any:
    """Two layers of two groups of two heads of 8, and 48 channels."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=2 * GROUPS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def calibration(batch_size: int = 96) -> Calibration:
    tokens = torch.randint(VOCAB, (6, 16), generator=torch.Generator().manual_seed(3))
    return Calibration.share(tokens, Processes.alone(), batch_size)


def scores_of(model: Any, criterion: Criterion, how: Aggregate = "sum", seed: int = 0) -> list[LayerScores]:
    return score_units(model, criterion, how, calibration() if needs_text(criterion) else None, seed=seed)


def all_differ(values: Tensor, criterion: Criterion) -> bool:
    """No two scores are equal, and none is 0, but for the lowest of flap."""
    none = int((values == 0).sum())
    return bool((values.isfinite() & (values >= 0)).all()) and none == (criterion == "flap") == len(values) - len(
        values[values > 0].unique()
    )


def flat(scores: list[LayerScores]) -> Tensor:
    return torch.cat([part for layer in scores for part in (layer.kv_groups, layer.ffn_channels)])


@each_criterion
def test_every_unit_has_a_score(model: Any, criterion: Criterion) -> None:
    scores = scores_of(model, criterion)
    assert [(len(one.kv_groups), len(one.ffn_channels)) for one in scores] == [(GROUPS, CHANNELS)] * 2
    assert {(part.dtype, part.device.type) for one in scores for part in (one.kv_groups, one.ffn_channels)} == {
        (torch.float64, "cpu")
    }
    values = flat(scores)
    assert values.shape == (2 * (GROUPS + CHANNELS),)
    assert all_differ(values, criterion)


def test_random_scores_depend_on_seed_layer_weight_and_nothing_else(model: Any) -> None:
    first = scores_of(model, "random", seed=4)
    torch.rand(3)
    assert torch.equal(flat(first), flat(scores_of(model, "random", seed=4)))
    assert not torch.equal(flat(first), flat(scores_of(model, "random", seed=5)))
    assert not torch.equal(first[0].ffn_channels, first[1].ffn_channels)
    values = torch.cat([scores_of(model, "random", "first", seed=seed)[0].ffn_channels for seed in range(40)])
    assert 0 <= float(values.min()) < 0.01 and 0.99 < float(values.max()) < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / len(values)) ** 0.5)


@each_criterion
def test_a_unit_without_weights_scores_nothing(model: Any, criterion: Criterion) -> None:
    layer = decoder_layers(model)[1]
    with torch.no_grad():
        for part, unit in [
            *((part, 0) for part in layer.group_weights),
            *((part, 5) for part in layer.channel_weights),
        ]:
            part.linear.weight.narrow(part.axis, unit * part.width, part.width).zero_()
    scores = scores_of(model, criterion)
    none = [(n, u) for n, one in enumerate(scores) for u, value in enumerate(one.kv_groups.tolist()) if value == 0]
    gone = [(n, u) for n, one in enumerate(scores) for u, value in enumerate(one.ffn_channels.tolist()) if value == 0]
    if criterion == "flap":  # it compares with the mean of a layer
        assert (int(scores[1].kv_groups.argmin()), int(scores[1].ffn_channels.argmin())) == (0, 5)
    else:
        assert (none, gone) == (([], []) if criterion == "random" else ([(1, 0)], [(1, 5)]))


@each_criterion
@each_of(PLAIN)
def test_units_of_every_family_have_scores(family: str, criterion: Criterion) -> None:
    text = Calibration.share(random_tokens(), Processes.alone(), 96)
    scores = score_units(tiny_model(family).requires_grad_(False), criterion, "sum", text, seed=0)
    assert [(len(one.kv_groups), len(one.ffn_channels)) for one in scores] == [(4, 48)] * 3
    assert all_differ(flat(scores), criterion)


@pytest.mark.parametrize("how", AGGREGATES)
@each_criterion
def test_projections_stacked_in_one_linear_score_as_separate_ones(criterion: Criterion, how: Aggregate) -> None:
    """A Llama, and the Phi-3 that is the same function."""
    llama = tiny_model("llama").requires_grad_(False)
    phi3 = tiny_model("phi3", partial_rotary_factor=1.0, sliding_window=None, rms_norm_eps=llama.config.rms_norm_eps)
    state = dict(llama.state_dict())
    for number in range(3):
        for stacked, names in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            parts = [f"model.layers.{number}.{stacked.partition('.')[0]}.{name}_proj.weight" for name in names]
            state[f"model.layers.{number}.{stacked}_proj.weight"] = torch.cat([state.pop(part) for part in parts])
    phi3.load_state_dict(state)
    phi3.requires_grad_(False)
    text = Calibration.share(random_tokens(4), Processes.alone(), 2 * random_tokens().shape[1])
    found, expected = (flat(score_units(model, criterion, how, text, seed=0)) for model in (phi3, llama))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_magnitude_of_a_unit_by_hand(model: Any) -> None:
    one = model.model.layers[1]
    attention, mlp = one.self_attn, one.mlp
    group = [
        attention.q_proj.weight[16:32],  # two query heads of 8 channels
        attention.k_proj.weight[8:16],
        attention.v_proj.weight[8:16],
        attention.o_proj.weight[:, 16:32],
    ]
    channel = [mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7]]
    for criterion, order in (("magnitude_l1", 1), ("magnitude_l2", 2)):
        scores = scores_of(model, criterion)[1]
        for found, parts in ((scores.kv_groups[1], group), (scores.ffn_channels[7], channel)):
            norms = [float(torch.linalg.norm(part.double().flatten(), order)) for part in parts]
            assert float(found) == pytest.approx(sum(norms), rel=1e-12)


def test_aggregates_of_a_channel_by_hand(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    weights = (mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7])
    norms = [float(weight.double().norm()) for weight in weights]
    expected = {
        "sum": sum(norms),
        "prod": math.prod(norms),
        "max": max(norms),
        "mean": sum(norms) / 3,
        "first": norms[0],
    }
    assert list(expected) == list(AGGREGATES)
    found = {how: float(scores_of(model, "magnitude_l2", how)[0].ffn_channels[7]) for how in AGGREGATES}
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("criterion", get_args(WeightCriterion))
def test_first_is_one_of_the_scores_that_are_summed(model: Any, criterion: Criterion) -> None:
    first, largest, total = (flat(scores_of(model, criterion, how)) for how in ("first", "max", "sum"))
    assert bool((first < total).all() and (first <= largest).all())
    assert bool((first == largest).any() and (first < largest).any())


def test_first_does_not_look_at_the_other_weights(model: Any) -> None:
    before = scores_of(model, "magnitude_l2", "first")
    with torch.no_grad():
        for layer in decoder_layers(model):
            for name in ("k", "v", "o", "up", "down"):
                layer.linears[name].weight.mul_(3)
    assert torch.equal(flat(scores_of(model, "magnitude_l2", "first")), flat(before))
    with torch.no_grad():
        for layer in decoder_layers(model):
            layer.q.weight.mul_(2)
            layer.gate.weight.mul_(2)
    assert torch.equal(flat(scores_of(model, "magnitude_l2", "first")), 2 * flat(before))


def test_wanda_is_weight_times_input(model: Any) -> None:
    inputs: list[Tensor] = []
    down = model.model.layers[0].mlp.down_proj
    given = calibration()
    handle = down.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    scores = score_units(model, "wanda", "sum", given, seed=0)
    handle.remove()
    (seen,) = inputs
    of_down = (down.weight.double().abs() * seen.flatten(0, 1).norm(dim=0)).sum(0)
    residual = [model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj]
    handle = residual[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    model(input_ids=given.batches[0].tokens)
    handle.remove()
    norms = inputs[1].flatten(0, 1).norm(dim=0)
    of_rows = sum((linear.weight.double().abs() * norms).sum(1) for linear in residual)
    assert torch.allclose(scores[0].ffn_channels, of_down + of_rows, rtol=1e-6)


def test_reconstruction_deals_the_mean_of_both_orders_in_the_order_of_removal(model: Any) -> None:
    inputs: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0][:, 4:]))
        for name, linear in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj))
    ]
    found, fisher, taylor = (
        scores_of(model, criterion)[1] for criterion in ("reconstruction", "fisher", "param_first")
    )
    for handle in handles:
        handle.remove()
    for name, linear, width, dealt, scores in (
        ("o", layer.self_attn.o_proj, 16, found.kv_groups, fisher.kv_groups * taylor.kv_groups),
        ("down", layer.mlp.down_proj, 1, found.ffn_channels, fisher.ffn_channels * taylor.ffn_channels),
    ):
        seen = inputs[name].flatten(0, 1)
        order = greedy_removal(linear.weight, seen.T @ seen, width).order
        assert torch.equal(dealt.argsort(), order)
        assert torch.allclose(dealt.sort().values, scores.sqrt().sort().values, rtol=1e-12)
    assert not torch.equal(found.ffn_channels, fisher.ffn_channels)


def test_a_bias_takes_in_what_inputs_have_in_common() -> None:
    """A channel that is large but always the same costs nothing where down has a bias, and much where it has none."""
    for family, place in (("gpt2", 0), ("llama", None)):
        model = tiny_model(family).requires_grad_(False)
        down = decoder_layers(model)[1].down

        def constant(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0].index_fill(2, torch.tensor(7), 30.0),)

        down.register_forward_pre_hook(constant)
        text = Calibration.share(random_tokens(8, 40), Processes.alone(), 96)
        channels = score_units(model, "reconstruction", "sum", text, seed=0)[1].ffn_channels
        rank = int(ranks(channels)[7])
        assert rank == place if place is not None else rank > len(channels) // 2


def test_flap_ranks_all_units_by_the_fluctuation_of_o_and_down(model: Any) -> None:
    layers = decoder_layers(model)
    scores = scores_of(model, "flap")
    inputs: list[Tensor] = []
    linears = [linear for layer in layers for linear in (layer.o, layer.down)]
    handles = [one.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))) for one in linears]
    model(input_ids=calibration().batches[0].tokens)
    for handle in handles:
        handle.remove()
    deviations = []
    for linear, seen, units in zip(linears, inputs, [GROUPS, CHANNELS] * 2, strict=True):
        columns = seen.double().var(0, correction=0) * linear.weight.double().square().sum(0)
        deviations.append(((columns - columns.mean()) / columns.std(correction=0)).view(units, -1).mean(1))
    lowest = torch.cat(deviations).min()
    of_group, of_channel = 16 * 32 * 2 + 8 * 32 * 2, 3 * 32
    prices = [part for one in scores for part in (one.kv_groups / of_group, one.ffn_channels / of_channel)]
    torch.testing.assert_close(torch.cat(prices), torch.cat(deviations) - lowest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["reconstruction", "flap"])
@pytest.mark.parametrize("groups", [1, 8])
def test_multi_query_and_multi_head_attention_have_scores_too(criterion: Criterion, groups: int) -> None:
    text = Calibration.share(random_tokens(), Processes.alone(), 96)
    model = tiny_model("llama", num_key_value_heads=groups).requires_grad_(False)
    scores = score_units(model, criterion, "sum", text, seed=0)
    assert [(len(one.kv_groups), len(one.ffn_channels)) for one in scores] == [(groups, 48)] * 3
    assert bool(flat(scores).isfinite().all())


@pytest.mark.parametrize("criterion", ["flap", "wanda", "magnitude_l1"])
def test_the_projection_whose_scores_are_not_finite_is_named(model: Any, criterion: Criterion) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(UserError, match=r"1\.(up|down)"):
        scores_of(model, criterion)


def test_the_weight_that_is_not_finite_is_named(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    for criterion in ("fisher", "reconstruction"):
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight of the base model"):
            scores_of(model, criterion)


def test_text_is_for_gradients_and_inputs() -> None:
    assert [criterion for criterion in CRITERIA if not needs_text(criterion)] == [
        "magnitude_l1",
        "magnitude_l2",
        "random",
    ]


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


@each_criterion
def test_half_precision_ranks_units_as_single_does(model: Any, criterion: Criterion) -> None:
    expected = scores_of(model, criterion)
    found = scores_of(model.to(torch.bfloat16), criterion)
    for one, other in zip(found, expected, strict=True):
        assert bool(one.ffn_channels.isfinite().all() and one.kv_groups.isfinite().all())
        both = torch.stack([ranks(one.ffn_channels), ranks(other.ffn_channels)])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9
        assert torch.allclose(one.kv_groups, other.kv_groups, rtol=0.2)


@each_criterion
def test_scoring_leaves_the_model_as_it_was(model: Any, criterion: Criterion) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = flat(scores_of(model, criterion))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert torch.equal(flat(scores_of(model, criterion)), first)


@each_criterion
def test_the_micro_batch_does_not_matter(model: Any, criterion: Criterion) -> None:
    together, apart = (flat(score_units(model, criterion, "sum", calibration(size), seed=0)) for size in (96, 1))
    assert torch.allclose(together, apart, rtol=1e-3)
