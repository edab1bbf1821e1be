import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qpruner.anatomy import architecture_of, decoder_layers, num_linear_parameters
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.model_folder import build_skeleton
from qpruner.plan import CompressionPlan
from qpruner.pruning.rounds import Size, describe, legal_ratios, prune_
from qpruner.pruning.scores import LayerScores, score_units
from qpruner.pruning.selection import Kept, SelectionConfig, Supply
from qpruner.pruning.supplies import round_to, smallest_step, supplies
from qpruner.pruning.surgery import narrow_, stated_by_weights

LAYERS, GROUPS, CHANNELS, HIDDEN, HEAD = 3, 4, 41, 64, 8
GROUP = (2 * 2 + 2) * HEAD * HIDDEN  # parameters: two query heads in q and o, one head in k and v
CHANNEL = 3 * HIDDEN

LOCAL, GLOBAL, UNIFORM = (
    SelectionConfig(scope="local"),
    SelectionConfig(scope="global"),
    SelectionConfig(scope="global", uniform=True),
)
each_scope = pytest.mark.parametrize("selection", [LOCAL, GLOBAL, UNIFORM], ids=["local", "global", "uniform"])


def build(family: str = "llama", **overrides: Any) -> Any:
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    shape = {
        "vocab_size": 48,
        "hidden_size": HIDDEN,
        "intermediate_size": CHANNELS,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2 * GROUPS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
    }
    model = model_class(config_class(**shape | overrides)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    return model


def offers_of(model: Any, selection: SelectionConfig) -> list[Supply]:
    return supplies(model, selection, architecture_of(model.config))


def step_of(model: Any, selection: SelectionConfig) -> int:
    return smallest_step(offers_of(model, selection), selection, round_to(model, selection))


def by_magnitude(model: Any) -> list[LayerScores]:
    return score_units(model, "magnitude_l2", "sum", None, seed=0)


def same(kept: Kept) -> Kept:
    return kept


def prune(
    model: Any,
    ratio: float,
    selection: SelectionConfig = LOCAL,
    *,
    rounds: int = 1,
    score: Callable[[Any], list[LayerScores]] = by_magnitude,
    agree: Callable[[Kept], Kept] = same,
) -> CompressionPlan:
    plan = CompressionPlan.dense(architecture_of(model.config), "f00d")

    def narrow(kept: Kept) -> None:
        nonlocal plan
        narrow_(model, agreed := agree(kept))
        plan = plan.keeping(agreed)

    prune_(model, plan.architecture, ratio=ratio, rounds=rounds, selection=selection, score=score, narrow=narrow)
    return plan


def rows(units: tuple[int, ...], width: int) -> list[int]:
    return [unit * width + place for unit in units for place in range(width)]


def assert_cut_from(model: Any, dense: Any, plan: CompressionPlan) -> None:
    """What is left are the rows and columns of the dense model that the plan keeps, and everything else of it."""
    expected = dense.state_dict()
    for number, kept in enumerate(plan.layers):
        heads, one, channels = rows(kept.kv_groups, 2 * HEAD), rows(kept.kv_groups, HEAD), list(kept.ffn_channels)
        for name, index, axis in (
            ("self_attn.q_proj", heads, 0),
            ("self_attn.k_proj", one, 0),
            ("self_attn.v_proj", one, 0),
            ("self_attn.o_proj", heads, 1),
            ("mlp.gate_proj", channels, 0),
            ("mlp.up_proj", channels, 0),
            ("mlp.down_proj", channels, 1),
        ):
            weight, bias = (f"model.layers.{number}.{name}.{part}" for part in ("weight", "bias"))
            expected[weight] = expected[weight][index] if axis == 0 else expected[weight][:, index]
            if bias in expected and axis == 0:
                expected[bias] = expected[bias][index]
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@each_scope
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_ratio_is_met_by_slices_of_the_dense_model(
    family: str, selection: SelectionConfig, ratio: float, rounds: int
) -> None:
    dense = build(family)
    model, total = copy.deepcopy(dense), num_parameters(dense)
    seeds = iter(range(100, 200))
    plan = prune(
        model,
        ratio,
        selection,
        rounds=rounds,
        score=lambda narrowed: score_units(narrowed, "random", "sum", None, seed=next(seeds)),
    )
    assert abs(total * (1 - ratio) - num_parameters(model)) <= 2 * CHANNEL * (1 if selection is GLOBAL else LAYERS)
    assert next(seeds) == 100 + rounds
    assert plan.base_sha256 == "f00d"
    assert plan.architecture == architecture_of(dense.config)
    assert plan.widths == architecture_of(model.config) == stated_by_weights(model)
    assert all(width % 2 == 0 or width == CHANNELS for width in plan.widths.ffn_channels)
    assert_cut_from(model, dense, plan)
    if selection is not GLOBAL:
        assert len(set(plan.widths.kv_groups)) == len(set(plan.widths.ffn_channels)) == 1
    logits = model(input_ids=torch.arange(12)[None]).logits
    assert logits.shape == (1, 12, 48) and bool(logits.isfinite().all())


def test_the_strongest_stay() -> None:
    model = build()
    strong = [(1, 3), (0, 2), (2, 3)]
    for layer, groups in zip(decoder_layers(model), strong, strict=True):
        layer.q.weight[rows(groups, 2 * HEAD)] += 10
        layer.gate.weight[::2] += 10
    plan = prune(model, LAYERS * (2 * GROUP + 21 * CHANNEL) / num_parameters(model))
    assert [layer.kv_groups for layer in plan.layers] == strong
    assert all(layer.ffn_channels[0] == 0 and len(layer.ffn_channels) == 20 for layer in plan.layers)
    assert all(set(layer.ffn_channels) < set(range(0, CHANNELS, 2)) for layer in plan.layers)


def test_each_round_scores_what_the_one_before_left() -> None:
    model, seen = build(), []

    def score(narrowed: Any) -> list[LayerScores]:
        seen.append(num_parameters(narrowed))
        return by_magnitude(narrowed)

    total = num_parameters(model)
    prune(model, 0.45, rounds=3, score=score)
    # A third of the way each, to the nearest group and channel: 4 groups to 2 and 41 channels to 24.
    kept = [(4, 41), (3, 35), (3, 30)]
    gone = [LAYERS * ((4 - groups) * GROUP + (41 - channels) * CHANNEL) for groups, channels in kept]
    assert [total - now for now in seen] == gone


@pytest.mark.parametrize("rounds", [4, 8])
def test_rounds_end_with_the_widths_of_one_round(rounds: int) -> None:
    once, often = (prune(build(), 0.45, rounds=number).widths for number in (1, rounds))
    assert often.kv_groups == once.kv_groups == (2,) * LAYERS
    assert often.ffn_channels == once.ffn_channels


def test_what_was_agreed_on_is_kept() -> None:
    dense = build()
    model, asked = copy.deepcopy(dense), []

    def first_units(kept: Kept) -> Kept:
        asked.append(kept)
        return [(list(range(len(groups))), list(range(len(channels)))) for groups, channels in kept]

    plan = prune(model, 0.4, rounds=2, agree=first_units)
    assert len(asked) == 2
    assert any(channels != list(range(len(channels))) for _, channels in asked[0])
    for layer in plan.layers:
        assert layer.kv_groups == tuple(range(len(layer.kv_groups)))
        assert layer.ffn_channels == tuple(range(len(layer.ffn_channels)))
    assert_cut_from(model, dense, plan)


def test_layers_left_alone_stay_whole() -> None:
    dense = build()
    for scope in ("local", "global"):
        model = copy.deepcopy(dense)
        plan = prune(model, 0.15, SelectionConfig(scope=scope, leave_alone=(0, -1)))
        assert [plan.widths.kv_groups[n] for n in (0, 2)] == [GROUPS] * 2
        assert [plan.widths.ffn_channels[n] for n in (0, 2)] == [CHANNELS] * 2
        assert plan.widths.kv_groups[1] < GROUPS and plan.widths.ffn_channels[1] < CHANNELS
        assert_cut_from(model, dense, plan)


@each_scope
def test_the_floor_is_a_share_of_the_dense_model(selection: SelectionConfig) -> None:
    model = build()
    selection = SelectionConfig(scope=selection.scope, uniform=selection.uniform, floor=0.5)
    removable = LAYERS * (2 * GROUP + 19 * CHANNEL)  # 2 of 4 groups stay, and 22 of 41 channels
    plan = prune(model, removable / num_parameters(model), selection, rounds=3)
    assert plan.widths.kv_groups == (2,) * LAYERS
    assert plan.widths.ffn_channels == (22,) * LAYERS


def test_what_layers_can_give_by_hand() -> None:
    one, other, _ = offers_of(build(), SelectionConfig(leave_alone=[1], floor=0.3, round_to=8))
    assert (one.kv_groups, one.ffn_channels, one.group_parameters, one.channel_parameters) == (4, 41, GROUP, CHANNEL)
    assert (one.least_groups, one.least_channels, other.least_groups, other.least_channels) == (2, 16, 4, 41)
    with_biases, *_ = offers_of(build("qwen2"), LOCAL)
    assert (with_biases.group_parameters, with_biases.channel_parameters) == (GROUP + 4 * HEAD, CHANNEL)
    assert (round_to(build(), LOCAL), round_to(build(), SelectionConfig(round_to=5))) == (2, 5)
    assert step_of(build(), LOCAL) == step_of(build(), UNIFORM) == LAYERS * CHANNEL  # from 41 channels to 40
    assert step_of(build(), GLOBAL) == CHANNEL


# Bad input.


@each_scope
def test_too_high_a_ratio_names_the_highest_that_works(selection: SelectionConfig) -> None:
    dense = build()
    total = num_parameters(dense)
    removable = LAYERS * (3 * GROUP + 35 * CHANNEL)  # one group and 6 channels, a tenth rounded up to twos, stay
    for ratio in (0.99, 1.0, 1.5):
        with pytest.raises(UserError, match=f"The ratio is {ratio}; .*above 0") as error:
            prune(copy.deepcopy(dense), ratio, selection)
    highest = float(re.findall(r"at most ([\d.]+) ", str(error.value))[0])
    assert 0 <= removable / total - highest < 1e-4
    model = copy.deepcopy(dense)
    plan = prune(model, highest, selection)
    assert num_parameters(model) == total - removable
    assert set(zip(plan.widths.kv_groups, plan.widths.ffn_channels, strict=True)) == {(1, 6)}
    with pytest.raises(UserError):
        prune(copy.deepcopy(dense), highest + 2e-4, selection)


@pytest.mark.parametrize("ratio", [0.0, -0.2, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    model = build()
    with pytest.raises(UserError, match="must be above 0"):
        prune(model, ratio)
    assert stated_by_weights(model).ffn_channels == (CHANNELS,) * LAYERS


@each_scope
def test_too_low_a_ratio_names_the_smallest_step(selection: SelectionConfig) -> None:
    selection = SelectionConfig(scope=selection.scope, uniform=selection.uniform, round_to=8)
    dense = build(intermediate_size=40)
    total = num_parameters(dense)

    def channels_first(model: Any) -> list[LayerScores]:
        return [LayerScores(one.kv_groups * 1e9, one.ffn_channels) for one in by_magnitude(model)]

    step = 8 * CHANNEL * (1 if selection.scope == "global" and not selection.uniform else LAYERS)
    with pytest.raises(UserError, match=r"would remove nothing; .*lower selection\.round_to") as error:
        prune(copy.deepcopy(dense), 0.49 * step / total, selection)
    named = float(re.findall(r"removes ([\d.]+)% of all", str(error.value))[0]) / 100
    assert named == pytest.approx(step / total, abs=5e-5)
    model = copy.deepcopy(dense)
    prune(model, named, selection, score=channels_first)
    assert num_parameters(model) == total - step


@each_scope
def test_what_cannot_be_had_is_told_before_units_are_scored(selection: SelectionConfig) -> None:
    def never(model: Any) -> list[LayerScores]:
        pytest.fail("units were scored")

    for ratio in (1e-5, 0.99):
        with pytest.raises(UserError, match="would remove nothing|must be above 0 and at most"):
            prune(build(), ratio, selection, score=never)


@each_scope
def test_floors_are_shares_of_the_dense_widths_however_often_a_model_is_pruned(selection: SelectionConfig) -> None:
    """Half of 41 channels in steps of two are 22, half of 4 groups 2: after the first pruning nothing may go."""
    model = build()
    dense = architecture_of(model.config)
    selection = replace(selection, floor=0.5)
    highest = sum(supply.parameters for supply in offers_of(model, selection)) / num_parameters(model)

    def again(ratio: float, floored: SelectionConfig) -> None:
        prune_(model, dense, ratio=ratio, rounds=1, selection=floored, score=by_magnitude,
               narrow=lambda kept: narrow_(model, kept))  # fmt: skip

    again(highest, selection)
    widths = stated_by_weights(model)
    assert (widths.kv_groups, widths.ffn_channels) == ((2,) * LAYERS, (22,) * LAYERS)
    with pytest.raises(UserError, match="nothing can be removed"):
        again(0.1, selection)
    before = num_parameters(model)
    again(0.1, replace(selection, floor=0.3))
    assert 1 - num_parameters(model) / before == pytest.approx(0.1, abs=0.02)
    assert min(stated_by_weights(model).ffn_channels) >= 0.3 * CHANNELS


def test_layers_to_leave_alone_must_be_there_and_not_be_all() -> None:
    for numbers in ([0, 1, 2], [0, 1, -1], [-1, -2, -3]):
        with pytest.raises(UserError, match="names every layer"):
            prune(build(), 0.2, SelectionConfig(leave_alone=numbers))
    for wrong in (3, -4):
        with pytest.raises(UserError, match=rf"names layers \[{wrong}\]; the model has 0 to 2"):
            prune(build(), 0.2, SelectionConfig(leave_alone=[1, wrong]))


def test_layers_that_differ_cannot_end_equal() -> None:
    model = build()
    narrow_(model, [(range(4), range(40)), (range(3), range(40)), (range(4), range(40))])
    with pytest.raises(UserError, match=r"already differ: \[\(3, 40\), \(4, 40\)\] KV groups and FFN channels"):
        prune(model, 0.2, UNIFORM)
    assert prune(model, 0.2, GLOBAL).architecture.kv_groups == (4, 3, 4)


# What is said of it.


def test_the_line_states_what_is_counted() -> None:
    for selection in (LOCAL, GLOBAL):
        dense = build()
        model = copy.deepcopy(dense)
        plan = prune(model, 0.4, selection)
        line = describe(plan, Size.of(dense), Size.of(model), "asked for two fifths", ())
        assert "\n" not in line
        counts = num_parameters(dense), num_parameters(model)
        assert f"Pruned {counts[0]:,} to {counts[1]:,} parameters, {4 * counts[0]:,} to {4 * counts[1]:,} bytes" in line
        assert "of all (asked for two fifths)" in line
        of_all, of_linears = (float(share) / 100 for share in re.findall(r"([\d.]+)%", line))
        assert of_all == pytest.approx(1 - counts[1] / counts[0], abs=5e-5)
        linears = [num_linear_parameters(one) for one in (dense, model)]
        assert linears[0] == LAYERS * (GROUPS * GROUP + CHANNELS * CHANNEL)
        assert linears[0] - linears[1] == counts[0] - counts[1]
        assert of_linears == pytest.approx(1 - linears[1] / linears[0], abs=5e-5)
        groups, channels = plan.widths.kv_groups, plan.widths.ffn_channels
        kept = re.search(r"keep ([\d-]+) of 4 KV groups and ([\d-]+) of 41 FFN channels", line)
        assert kept is not None
        for stated, widths in zip(kept.groups(), (groups, channels), strict=True):
            assert {int(one) for one in stated.split("-")} == {min(widths), max(widths)}
        assert line.endswith("Left alone: embeddings, norms and head.")


def line_of(model: Any, selection: SelectionConfig, ratio: float = 0.2) -> str:
    before = Size.of(model)
    plan = prune(model, ratio, selection)
    return describe(plan, before, Size.of(model), "asked", selection.leave_alone)


def test_the_line_names_what_was_left_alone() -> None:
    assert line_of(build(num_hidden_layers=5), replace(LOCAL, leave_alone=[0, 1, -1])).endswith(
        "Left alone: embeddings, norms and head; layers 0-1 4, as asked."
    )
    assert line_of(build(num_key_value_heads=1), LOCAL).endswith(
        "head; attention, which has one key-value head, so that the FFN gave all."
    )
    assert line_of(build(), LOCAL, 0.03).endswith("attention, of which a whole KV group was too much or too dear.")
    size, dense = Size.of(build()), CompressionPlan.dense(stated_by_weights(build()), None)
    plan = dense.keeping([([0], [0]), (range(GROUPS), range(CHANNELS)), ([0], [0])])
    assert describe(plan, size, size, "", ()).endswith("layers 1, whose units were worth more than those of others.")


def test_with_one_key_value_head_the_ffn_gives_all() -> None:
    dense = build(num_key_value_heads=1)
    for selection in (LOCAL, GLOBAL, UNIFORM):
        model = copy.deepcopy(dense)
        plan = prune(model, 0.3, selection)
        assert plan.widths.kv_groups == (1,) * LAYERS
        step = 2 * CHANNEL * (1 if selection is GLOBAL else LAYERS)
        assert abs(0.7 * num_parameters(dense) - num_parameters(model)) <= step / 2 + 1


# Before any of it.


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(LOCAL, id="plain"),
        pytest.param(replace(LOCAL, leave_alone=[1], floor=0.3), id="layer left alone"),
        pytest.param(replace(LOCAL, round_to=4), id="fours"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_legal_ratios_are_what_pruning_gives(family: str, selection: SelectionConfig) -> None:
    dense = build(family)
    skeleton = build_skeleton(dense.config)
    found = list(legal_ratios(skeleton, selection, 0.05))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert stated_by_weights(skeleton) == stated_by_weights(dense)
    total, linears = num_parameters(dense), num_linear_parameters(dense)
    highest = sum(supply.parameters for supply in offers_of(dense, selection)) / total
    assert int(highest / 0.05) <= len(found) <= int(highest / 0.05) + 1  # the last may be the one before it
    half_step = LAYERS * (selection.round_to or 2) * CHANNEL / total / 2
    for number, legal in enumerate(found, 1):
        assert legal.ratio == pytest.approx(min(0.05 * number, highest), abs=half_step + 1e-9)
        model = copy.deepcopy(dense)
        plan = prune(model, legal.ratio, selection)
        assert num_parameters(model) == legal.parameters == round(total * (1 - legal.ratio))
        assert legal.linears_removed == pytest.approx((total - legal.parameters) / linears, rel=1e-12)
        pruned = [n for n in range(LAYERS) if n not in selection.leave_alone]
        assert {str(plan.widths.kv_groups[n]) for n in pruned} == {legal.kv_groups}
        assert {str(plan.widths.ffn_channels[n]) for n in pruned} == {legal.ffn_channels}
    assert found[-1].ratio == pytest.approx(highest, rel=1e-12)


def test_rounds_wait_for_a_step_that_is_too_large_for_one_of_them() -> None:
    """Groups are worthless and dear, channels are not: channels stay, however many rounds there are."""

    def score(model: Any) -> list[LayerScores]:
        return [
            LayerScores(
                torch.full((layer.kv_groups,), 1e-9, dtype=torch.float64),
                torch.arange(1, layer.ffn_channels + 1, dtype=torch.float64),
            )
            for layer in decoder_layers(model)
        ]

    for uniform in (True, False):
        selection = SelectionConfig(scope="global", uniform=uniform)
        once, often = (prune(build(), 0.3, selection, rounds=rounds, score=score).widths for rounds in (1, 6))
        assert often == once
        assert sum(once.kv_groups) < LAYERS * 4


@each_scope
@pytest.mark.parametrize("rounds", [2, 3])
def test_a_step_that_takes_all_there_is_may_come_before_the_last_round(selection: SelectionConfig, rounds: int) -> None:
    model = build(num_key_value_heads=1, intermediate_size=64, num_hidden_layers=1)
    selection = replace(selection, round_to=32)
    highest = 32 * CHANNEL / num_parameters(model)
    assert prune(model, highest, selection, rounds=rounds).widths.ffn_channels == (32,)
