import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qpruner.errors import UserError
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import (
    Kept,
    SelectionConfig,
    Supply,
    competing_widths,
    default_round_to,
    keep_highest,
    local_widths,
)

LOCAL, GLOBAL, UNIFORM = (
    SelectionConfig(scope="local"),
    SelectionConfig(scope="global"),
    SelectionConfig(scope="global", uniform=True),
)

Problem = tuple[list[LayerScores], list[Supply], int, int]
"""Scores, supplies, parameters to remove, round_to."""


def layer_scores(groups: Sequence[float], channels: Sequence[float]) -> LayerScores:
    return LayerScores(torch.tensor(groups, dtype=torch.float64), torch.tensor(channels, dtype=torch.float64))


def choose_kept(
    scores: list[LayerScores], supplies: list[Supply], remove: int, config: SelectionConfig, round_to: int
) -> Kept:
    """What `prune_` does in one round."""
    if config.scope == "local":
        return keep_highest(scores, local_widths(supplies, remove, round_to))
    return keep_highest(scores, competing_widths(scores, supplies, remove, round_to, uniform=config.uniform))


def widths_of(kept: Kept) -> list[tuple[int, int]]:
    return [(len(groups), len(channels)) for groups, channels in kept]


def removed_by(supplies: Sequence[Supply], widths: Sequence[tuple[int, int]]) -> int:
    return sum(supply.cost(*one) for supply, one in zip(supplies, widths, strict=True))


def whole(supply: Supply) -> Supply:
    """The same layer, left alone."""
    return Supply(
        supply.kv_groups,
        supply.ffn_channels,
        supply.group_parameters,
        supply.channel_parameters,
        supply.kv_groups,
        supply.ffn_channels,
    )


# What can be asked for.


@pytest.mark.parametrize(
    ("hidden_size", "expected"),
    [(16, 1), (31, 1), (32, 1), (64, 2), (128, 4), (512, 16), (1024, 32), (3072, 64), (4096, 128), (8192, 128)],
)
def test_default_round_to(hidden_size: int, expected: int) -> None:
    assert default_round_to(hidden_size) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 0.0}, r"floor is 0\.0.*\(0, 1\)"),
        ({"floor": -0.1}, r"floor is -0\.1"),
        ({"floor": 1.0}, r"floor is 1\.0"),
        ({"floor": math.nan}, "floor is nan"),
        ({"round_to": 0}, "round_to is 0.*at least 1"),
        ({"round_to": -8}, "round_to is -8"),
        ({"uniform": True, "leave_alone": [0]}, r"leave_alone is \[0\] and selection.uniform is true"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SelectionConfig(**options)


def test_possible_options_are_taken() -> None:
    assert SelectionConfig(floor=0.99, round_to=1).floor == 0.99
    assert SelectionConfig(leave_alone=[0, -1]) == SelectionConfig(leave_alone=(0, -1))
    assert hash(SelectionConfig(leave_alone=[0, -1])) == hash(SelectionConfig(leave_alone=(0, -1)))


# Widths of one layer.


def test_legal_ffn_widths_by_hand() -> None:
    assert Supply(4, 20, 1, 1, 1, 8).ffn_widths(4) == [20, 16, 12, 8]
    assert Supply(4, 18, 1, 1, 1, 8).ffn_widths(4) == [18, 16, 12, 8]
    assert Supply(4, 18, 1, 1, 1, 18).ffn_widths(4) == [18]
    assert Supply(4, 3, 1, 1, 1, 1).ffn_widths(1) == [3, 2, 1]


@pytest.mark.parametrize(
    ("ideal", "expected"), [(18, 18), (17.1, 18), (16.9, 16), (14.1, 16), (13.9, 12), (9, 8), (1, 8), (0, 8)]
)
def test_nearest_ffn_width_by_hand(ideal: float, expected: int) -> None:
    assert Supply(4, 18, 1, 1, 1, 8).ffn_width_near(ideal, 4) == expected


def test_what_a_layer_can_give() -> None:
    supply = Supply(4, 20, 100, 3, 2, 8)
    assert supply.cost(4, 20) == 0
    assert supply.cost(3, 20) == 100
    assert supply.cost(4, 19) == 3
    assert supply.parameters == supply.cost(2, 8) == 2 * 100 + 12 * 3
    assert whole(supply).parameters == 0


# Which units stay.


def test_the_highest_scores_stay_in_ascending_order() -> None:
    scores = [layer_scores([3, 9, 1, 4], [0.5, 0.1, 0.9, 0.2, 0.8, 0.7])]
    supplies = [Supply(4, 6, 6, 1, 1, 1)]
    assert choose_kept(scores, supplies, 15, LOCAL, 1) == [([1, 3], [2, 4, 5])]


def test_among_equal_scores_the_first_stay() -> None:
    scores = [layer_scores([1, 1, 1, 1], [2, 1, 2, 1, 1, 2])]
    supplies = [Supply(4, 6, 6, 1, 1, 1)]
    assert choose_kept(scores, supplies, 14, LOCAL, 1) == [([0, 1], [0, 1, 2, 5])]
    many = [layer_scores([1.0], [1.0] * 500)]
    assert choose_kept(many, [Supply(1, 500, 1, 1, 1, 1)], 200, GLOBAL, 1) == [([0], list(range(300)))]


# Local: the same share everywhere.

EQUAL = [Supply(4, 32, 160, 10, 1, 4)] * 2  # 960 parameters in each layer, and the last group and 4 channels stay


@pytest.mark.parametrize(
    ("remove", "expected"),
    [
        (960, (2, 16)),  # half: 2 of 4 groups and half of the channels
        (480, (3, 24)),  # a quarter
        (700, (3, 12)),  # 36 %: 1 group (25 %) and not 2, so that channels give 700 - 320 of 640, more than 36 %
        (740, (2, 28)),  # 39 %: 2 groups, so that channels give 740 - 640 of 640, to the nearest 80
        (180, (4, 24)),  # 9 %: no group
        (1200, (2, 4)),  # 62.4 %: 2 groups, and the channels meet the total
        (1520, (1, 4)),  # the most
        (1, (4, 32)),
    ],
)
def test_local_widths_by_hand(remove: int, expected: tuple[int, int]) -> None:
    assert local_widths(EQUAL, remove, 4) == [expected] * 2


def test_layers_left_alone_give_nothing_and_the_others_more() -> None:
    supplies = [EQUAL[0], whole(EQUAL[0]), EQUAL[0], EQUAL[0]]
    assert local_widths(supplies, 720, 4) == [(3, 24), (4, 32), (3, 24), (3, 24)]


def test_with_one_group_attention_stays_whole() -> None:
    supplies = [Supply(1, 32, 640, 10, 1, 4)] * 2
    assert local_widths(supplies, 400, 4) == [(1, 12)] * 2


def test_where_channels_do_not_suffice_groups_go_beyond_the_nearest() -> None:
    supplies = [Supply(4, 8, 100, 1, 1, 4)]
    assert local_widths(supplies, 300, 4) == [(1, 8)]
    assert local_widths(supplies, 204, 4) == [(2, 4)]
    assert local_widths(supplies, 140, 4) == [(3, 4)]  # 104 is as near as it gets


def test_layers_that_can_lose_units_set_the_steps() -> None:
    """The layer with most groups must keep them, and the widest its channels."""
    supplies = [Supply(4, 8, 100, 1, 4, 4), Supply(2, 32, 100, 1, 1, 32)]
    assert local_widths(supplies, 104, 4) == [(4, 4), (1, 32)]
    assert local_widths(supplies, 4, 4) == [(4, 4), (2, 32)]


def test_local_shares_do_not_look_at_scores() -> None:
    scores = [layer_scores([1, 2, 3, 4], range(32)), layer_scores([400, 300, 200, 100], range(3200, 0, -100))]
    kept = choose_kept(scores, EQUAL, 960, LOCAL, 4)
    assert kept == [([2, 3], list(range(16, 32))), ([0, 1], list(range(16)))]


# Global: layers compete.


def test_global_takes_the_cheapest_units_of_all_layers() -> None:
    """Where all units cost the same, those that go are the set of that size with the least score."""
    generator = torch.Generator().manual_seed(0)
    supplies = [Supply(3, 4, 7, 7, 1, 1), Supply(2, 3, 7, 7, 1, 2)]
    for count in range(1, sum(supply.parameters for supply in supplies) // 7 + 1):
        groups, channels = torch.rand(2, 3, generator=generator), torch.rand(2, 4, generator=generator)
        scores = [
            layer_scores(groups[0].tolist(), channels[0].tolist()),
            layer_scores(groups[1][:2].tolist(), channels[1][:3].tolist()),
        ]
        kept = choose_kept(scores, supplies, 7 * count, GLOBAL, 1)
        units = [
            (layer, kind, unit, float(value))
            for layer, one in enumerate(scores)
            for kind, values in enumerate((one.kv_groups, one.ffn_channels))
            for unit, value in enumerate(values)
        ]
        least = [(s.least_groups, s.least_channels) for s in supplies]
        sizes = [(s.kv_groups, s.ffn_channels) for s in supplies]

        def legal(gone: Sequence[tuple[int, int, int, float]], sizes: Any = sizes, least: Any = least) -> bool:
            return all(
                sizes[layer][kind] - sum(one[:2] == (layer, kind) for one in gone) >= least[layer][kind]
                for layer, kind in itertools.product(range(2), range(2))
            )

        best = min(filter(legal, itertools.combinations(units, count)), key=lambda gone: sum(one[3] for one in gone))
        stays = {one[:3] for one in units} - {one[:3] for one in best}
        assert {(n, k, u) for n, one in enumerate(kept) for k, places in enumerate(one) for u in places} == stays


def test_global_prices_by_parameter() -> None:
    scores = [layer_scores([10, 99], [1, 99]), layer_scores([30, 99], [2, 99])]
    supplies = [Supply(2, 2, 100, 5, 1, 1)] * 2  # 0.1 and 0.3 a parameter for groups, 0.2 and 0.4 for channels
    assert widths_of(choose_kept(scores, supplies, 100, GLOBAL, 1)) == [(1, 2), (2, 2)]
    assert widths_of(choose_kept(scores, supplies, 105, GLOBAL, 1)) == [(1, 1), (2, 2)]
    assert widths_of(choose_kept(scores, supplies, 205, GLOBAL, 1)) == [(1, 1), (1, 2)]
    assert widths_of(choose_kept(scores, supplies, 210, GLOBAL, 1)) == [(1, 1), (1, 1)]


def test_global_channels_go_in_steps() -> None:
    """10 channels go to 8 and then to 4: the weakest two, then the weakest four of the rest."""
    scores = [layer_scores([1e9], [5, 1, 6, 7, 8, 2, 9, 3, 4, 10])]
    supplies = [Supply(1, 10, 1, 1, 1, 4)]
    kept = [choose_kept(scores, supplies, remove, GLOBAL, 4)[0][1] for remove in (1, 3, 4, 6)]
    assert kept == [[0, 2, 3, 4, 6, 7, 8, 9], [0, 2, 3, 4, 6, 7, 8, 9], [3, 4, 6, 9], [3, 4, 6, 9]]


def test_global_leaves_layers_alone_and_respects_the_floor() -> None:
    scores = [layer_scores([0.0] * 4, [0.0] * 32), layer_scores([1.0] * 4, [1.0] * 32)]
    supplies = [whole(EQUAL[0]), EQUAL[1]]
    assert widths_of(choose_kept(scores, supplies, EQUAL[1].parameters, GLOBAL, 4)) == [(4, 32), (1, 4)]
    assert widths_of(choose_kept(scores, EQUAL, EQUAL[0].parameters, GLOBAL, 4)) == [(1, 4), (4, 32)]


def test_uniform_layers_end_equal_and_are_priced_together() -> None:
    scores = [layer_scores([0, 100], [1, 99]), layer_scores([100, 0], [99, 1])]
    supplies = [Supply(2, 2, 10, 10, 1, 1)] * 2
    assert choose_kept(scores, supplies, 20, UNIFORM, 1) == [([1], [0, 1]), ([0], [0, 1])]
    assert choose_kept(scores, supplies, 40, UNIFORM, 1) == [([1], [1]), ([0], [0])]


# Any model.


def supply_of(groups: int, channels: int, costs: tuple[int, int], floor: float, round_to: int) -> Supply:
    least = math.ceil(floor * channels / round_to) * round_to
    return Supply(groups, channels, *costs, max(1, math.ceil(floor * groups)), min(channels, least))


@st.composite
def problems(draw: st.DrawFn, *, equal: bool, alone: bool = True) -> Problem:
    round_to = draw(st.sampled_from([1, 2, 4, 8, 16]))
    floor = draw(st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9]))
    shapes = st.tuples(st.integers(1, 8), st.integers(1, 120), st.tuples(st.integers(1, 400), st.integers(1, 30)))
    count = draw(st.integers(1, 4))
    first = draw(shapes)
    chosen = [first if equal else draw(shapes) for _ in range(count)]
    supplies = [supply_of(*shape, floor, round_to) for shape in chosen]
    if alone:
        supplies = [
            whole(supply) if draw(st.booleans()) and number else supply for number, supply in enumerate(supplies)
        ]
    removable = sum(supply.parameters for supply in supplies)
    assume(removable > 0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    scores = [
        layer_scores(
            torch.rand(s.kv_groups, generator=generator).tolist(),
            torch.rand(s.ffn_channels, generator=generator).tolist(),
        )
        for s in supplies
    ]
    return scores, supplies, draw(st.integers(1, removable)), round_to


def assert_legal(problem: Problem, kept: Kept) -> None:
    scores, supplies, _, round_to = problem
    for score, supply, (groups, channels) in zip(scores, supplies, kept, strict=True):
        for values, places, least in (
            (score.kv_groups, groups, supply.least_groups),
            (score.ffn_channels, channels, supply.least_channels),
        ):
            assert least <= len(places) <= len(values)
            assert places == sorted(set(places)) and all(0 <= place < len(values) for place in places)
            gone = set(range(len(values))) - set(places)
            assert not gone or min(values[places]) >= max(values[sorted(gone)])
        assert len(channels) % round_to == 0 or len(channels) == supply.ffn_channels
        if not supply.parameters:
            assert (len(groups), len(channels)) == (supply.kv_groups, supply.ffn_channels)


ANY = settings(max_examples=150, deadline=None, derandomize=True)


@given(problems(equal=True))
@ANY
def test_local_meets_the_target_to_half_a_step_or_as_near_as_widths_allow(problem: Problem) -> None:
    scores, supplies, remove, round_to = problem
    kept = choose_kept(scores, supplies, remove, LOCAL, round_to)
    assert_legal(problem, kept)
    prunable = [supply for supply in supplies if supply.parameters]
    one = prunable[0]
    assert len({width for width, supply in zip(widths_of(kept), supplies, strict=True) if supply.parameters}) == 1
    nearest = min(
        abs(len(prunable) * one.cost(groups, channels) - remove)
        for groups in range(one.least_groups, one.kv_groups + 1)
        for channels in one.ffn_widths(round_to)
    )
    half_step = len(prunable) * one.channel_parameters * round_to / 2
    miss = abs(removed_by(supplies, widths_of(kept)) - remove)
    assert miss <= half_step or miss == nearest


@given(problems(equal=False))
@ANY
def test_local_widths_of_unequal_layers_are_legal(problem: Problem) -> None:
    scores, supplies, remove, round_to = problem
    assert_legal(problem, choose_kept(scores, supplies, remove, LOCAL, round_to))


@given(problems(equal=False))
@ANY
def test_global_stops_where_the_next_step_would_lead_away(problem: Problem) -> None:
    scores, supplies, remove, round_to = problem
    kept = choose_kept(scores, supplies, remove, GLOBAL, round_to)
    assert_legal(problem, kept)
    left = remove - removed_by(supplies, widths_of(kept))
    steps = []
    for supply, (groups, channels) in zip(supplies, widths_of(kept), strict=True):
        widths = supply.ffn_widths(round_to)
        if channels > supply.least_channels:
            steps.append((channels - widths[widths.index(channels) + 1]) * supply.channel_parameters)
        if groups > supply.least_groups:
            steps.append(supply.group_parameters)
    if left > 0:
        assert all(step > 2 * left for step in steps)
    else:
        largest = max(max(s.group_parameters, s.channel_parameters * round_to) for s in supplies if s.parameters)
        assert -left <= largest / 2


@given(problems(equal=True, alone=False))
@ANY
def test_uniform_ends_equal_and_within_half_a_step_of_all_layers(problem: Problem) -> None:
    scores, supplies, remove, round_to = problem
    kept = choose_kept(scores, supplies, remove, UNIFORM, round_to)
    assert_legal(problem, kept)
    assert len(set(widths_of(kept))) == 1
    assert widths_of(kept) == competing_widths(scores, supplies, remove, round_to, uniform=True)
    one, count = supplies[0], len(supplies)
    groups, channels = widths_of(kept)[0]
    miss = abs(count * one.cost(groups, channels) - remove)
    if channels > one.least_channels:
        assert miss <= count * max(one.channel_parameters * round_to, one.group_parameters) / 2


@pytest.mark.parametrize("config", [GLOBAL, UNIFORM], ids=["global", "uniform"])
@given(problem=problems(equal=True, alone=False))
@ANY
def test_all_that_can_go_goes_when_asked_for(config: SelectionConfig, problem: Problem) -> None:
    scores, supplies, _, round_to = problem
    removable = sum(supply.parameters for supply in supplies)
    kept = choose_kept(scores, supplies, removable, config, round_to)
    assert removed_by(supplies, widths_of(kept)) == removable


def removed_for_every_target(config: SelectionConfig) -> list[int]:
    """Parameters that go of three layers when 1, 2, ... all are asked for; `round_to` channels are 40 of a layer."""
    generator = torch.Generator().manual_seed(1)
    supplies = [Supply(4, 40, 120, 10, 1, 4)] * 3
    scores = [
        layer_scores(torch.rand(4, generator=generator).tolist(), torch.rand(40, generator=generator).tolist())
        for _ in supplies
    ]
    targets = range(1, sum(supply.parameters for supply in supplies) + 1)
    return [removed_by(supplies, widths_of(choose_kept(scores, supplies, t, config, 4))) for t in targets]


@pytest.mark.parametrize("config", [LOCAL, GLOBAL, UNIFORM], ids=["local", "global", "uniform"])
def test_more_goes_when_more_is_asked_for(config: SelectionConfig) -> None:
    gone = removed_for_every_target(config)
    assert gone == sorted(gone)
    assert gone[-1] == len(gone)


@pytest.mark.parametrize(
    ("config", "step"),
    [
        pytest.param(LOCAL, 3 * 40, id="local"),
        pytest.param(GLOBAL, 40, id="global"),
        pytest.param(UNIFORM, 3 * 40, id="uniform"),
    ],
)
def test_the_target_is_met_to_a_step_of_channels(config: SelectionConfig, step: int) -> None:
    gone = removed_for_every_target(config)
    assert max(abs(found - target) for target, found in enumerate(gone, 1)) <= step
