"""More and more units go on the way to a ratio, and none comes back."""

import re
from typing import Any

import pytest
import torch
from support.families import FFN, LAYERS, packed, tiny_model

from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import Precision
from qpruner.pruning.gradual import GradualPruning, agreement
from qpruner.pruning.rounds import prune_
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import Kept, SelectionConfig, local_widths
from qpruner.pruning.supplies import supplies
from qpruner.pruning.surgery import narrow_

GROUP, CHANNEL, TOTAL = 6144, 192, 114624
"""Parameters of the tiny llama: 16 x 6 rows or columns of 64, three of 64, and all."""

WAYS = {
    "local": SelectionConfig(scope="local"),
    "global": SelectionConfig(scope="global"),
    "uniform": SelectionConfig(scope="global", uniform=True),
    "alone": SelectionConfig(scope="global", leave_alone=(-1,)),
    "local, alone": SelectionConfig(scope="local", leave_alone=(1,)),
    "every channel": SelectionConfig(scope="global", round_to=1),
}


def everything() -> Kept:
    return [(list(range(4)), list(range(FFN)))] * LAYERS


def random_scores(seed: int) -> list[LayerScores]:
    """A group is worth about as much as its parameters in channels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        return torch.rand(n, generator=generator, dtype=torch.float64)

    return [LayerScores(GROUP / CHANNEL * draw(4), draw(FFN)) for _ in range(LAYERS)]


def of_alive(scores: list[LayerScores], alive: Kept) -> list[LayerScores]:
    pairs = zip(scores, alive, strict=True)
    return [LayerScores(one.kv_groups[groups], one.ffn_channels[channels]) for one, (groups, channels) in pairs]


def widths(kept: Kept) -> list[tuple[int, int]]:
    return [(len(groups), len(channels)) for groups, channels in kept]


def gradual(ratio: float, selection: SelectionConfig) -> GradualPruning:
    model = tiny_model("llama")
    return GradualPruning.of(model, ratio, selection, architecture_of(model.config))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", [0.15, 0.3])
def test_what_is_gone_stays_gone_and_the_ratio_is_met_at_the_end(way: str, ratio: float) -> None:
    """Whatever later scores say."""
    model, selection = tiny_model("llama"), WAYS[way]
    pruning = GradualPruning.of(model, ratio, selection, architecture_of(model.config))
    alive, gone = everything(), [0]
    for number, share in enumerate((0.2, 0.5, 0.9, 1.0)):
        kept = pruning.keep(random_scores(number), alive, share)
        for (groups, channels), (before_groups, before_channels) in zip(kept, alive, strict=True):
            assert set(groups) <= set(before_groups) and set(channels) <= set(before_channels)
            assert groups == sorted(groups) and channels == sorted(channels)
        gone.append(pruning.removed(kept))
        alive = kept
    assert gone == sorted(gone) and gone[1] > 0 and gone[-2] < gone[-1]
    if selection.scope == "global":  # the way there is even, up to a step that waits
        largest = GROUP * (LAYERS if selection.uniform else 1)
        assert all(abs(g - s * ratio * TOTAL) <= largest for g, s in zip(gone[1:], (0.2, 0.5, 0.9, 1.0), strict=True))
    narrow_(model, alive)
    assert TOTAL - num_parameters(model) == gone[-1]
    assert abs(gone[-1] - ratio * TOTAL) <= 2 * CHANNEL * (1 if way in ("global", "alone") else LAYERS) / 2
    multiple = selection.round_to or 2
    assert all(channels == FFN or channels % multiple == 0 for _, channels in widths(alive))
    if selection.uniform:
        assert len(set(widths(alive))) == 1
    for number in selection.leave_alone:
        assert widths(alive)[number] == (4, FFN)


@pytest.mark.parametrize("way", ["local", "local, alone"])
def test_at_the_end_the_local_widths_are_those_of_pruning_at_once(way: str) -> None:
    selection = WAYS[way]
    pruning = gradual(0.25, selection)
    model = tiny_model("llama")
    goal = local_widths(supplies(model, selection, architecture_of(model.config)), round(0.25 * TOTAL), 2)
    kept = pruning.keep(random_scores(0), everything(), 0.5)
    assert [(4 - g, FFN - c) for g, c in widths(kept)] == [(round((4 - g) / 2), round((FFN - c) / 2)) for g, c in goal]
    assert widths(pruning.keep(random_scores(1), kept, 1.0)) == goal


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_with_the_same_scores_it_keeps_what_rounds_of_pruning_keep(way: str, rounds: int) -> None:
    ratio, selection, scores = 0.18, WAYS[way], random_scores(7)
    model, alive = tiny_model("llama"), everything()

    def narrow(kept: Kept) -> None:
        """Keeps the account of the units by their places in the dense model."""
        for number, ((groups, channels), (some, few)) in enumerate(zip(list(alive), kept, strict=True)):
            alive[number] = ([groups[place] for place in some], [channels[place] for place in few])
        narrow_(model, kept)

    prune_(
        model,
        architecture_of(model.config),
        ratio=ratio,
        rounds=rounds,
        selection=selection,
        score=lambda _: of_alive(scores, alive),
        narrow=narrow,
    )
    pruning, kept = gradual(ratio, selection), everything()
    for number in range(1, rounds + 1):
        kept = pruning.keep(scores, kept, number / rounds)
    assert kept == alive


def test_the_lowest_of_those_alive_go() -> None:
    pruning, scores = gradual(0.05, WAYS["local"]), random_scores(2)
    alive: Kept = [(list(range(4)), [n for n in range(FFN) if n != 3])] * LAYERS
    kept = pruning.keep(scores, alive, 1.0)
    for score, (groups, channels) in zip(scores, kept, strict=True):
        order = [n for n in score.ffn_channels.argsort().tolist() if n != 3]
        assert groups == [0, 1, 2, 3] and channels == sorted(order[-len(channels) :]) and len(channels) < 47


def test_nothing_goes_at_the_start() -> None:
    for selection in WAYS.values():
        assert gradual(0.15, selection).keep(random_scores(0), everything(), 0.0) == everything()


def test_removed_by_hand() -> None:
    pruning = gradual(0.2, WAYS["local"])
    assert pruning.removed(everything()) == 0
    kept: Kept = [([0, 3], list(range(FFN))), ([0, 1, 2, 3], list(range(FFN - 5))), ([2], [0])]
    assert pruning.removed(kept) == (2 + 3) * GROUP + (5 + 47) * CHANNEL
    assert (pruning.total, pruning.in_linears) == (TOTAL, LAYERS * (4 * GROUP + FFN * CHANNEL))


def test_floors_are_shares_of_the_dense_widths() -> None:
    model = tiny_model("llama")
    dense = architecture_of(model.config)
    narrow_(model, [(range(2), range(24))] * LAYERS)
    floored = SelectionConfig(scope="local", floor=0.25)
    (supply, *_) = GradualPruning.of(model, 0.1, floored, dense).dense
    assert (supply.kv_groups, supply.least_groups) == (2, 1) and (supply.ffn_channels, supply.least_channels) == (
        24,
        12,
    )
    with pytest.raises(UserError, match="floor 0.5 and FFN widths in multiples of 2 nothing can be removed"):
        GradualPruning.of(model, 0.1, SelectionConfig(scope="local", floor=0.5), dense)


def test_a_packed_model_is_counted_as_the_dense_one() -> None:
    for precision in (Precision("nf4", 4), Precision("int8", 8)):
        model = packed(tiny_model("llama"), precision)
        found = GradualPruning.of(model, 0.2, WAYS["global"], architecture_of(model.config))
        assert found == gradual(0.2, WAYS["global"])


def test_agreement_by_hand() -> None:
    alive: Kept = [([0, 1], [0, 1, 2, 3]), ([0, 2], [0, 1])]
    one: Kept = [([0], [0, 1]), ([0, 2], [1])]  # without group 1, channels 2 and 3; channel 0 of the second layer
    other: Kept = [([0], [0, 3]), ([0, 2], [0])]  # without group 1, channels 1 and 2; channel 1
    assert agreement(alive, one, other) == 2 / 4
    assert agreement(alive, one, one) == 1
    assert agreement(alive, one, alive) == 0
    assert agreement(alive, alive, other) is None
    fewer: Kept = [([0], [0, 1, 2, 3]), ([0, 2], [0, 1])]
    assert agreement(alive, fewer, other) == 1 and agreement(alive, other, fewer) == 1 / 4


@pytest.mark.parametrize(("way", "step"), [("local", 6 * CHANNEL), ("uniform", 6 * CHANNEL), ("global", 2 * CHANNEL)])
def test_a_ratio_below_half_a_step_is_refused(way: str, step: int) -> None:
    half = step / 2 / TOTAL
    too_low = half * 0.99
    message = f"A ratio of {too_low} would remove nothing; the smallest step removes"
    with pytest.raises(UserError, match=re.escape(f"{message} {2 * half:.2%} of all parameters. Ask for more")):
        gradual(too_low, WAYS[way])
    pruning = gradual(half * 1.01, WAYS[way])
    assert pruning.removed(pruning.keep(random_scores(0), everything(), 1.0)) == step


@pytest.mark.parametrize(
    ("ratio", "options", "said"),
    [
        (0.9, {}, "The ratio is 0.9; .* at most 0.69"),
        (0.4, {"leave_alone": (0, 2)}, "The ratio is 0.4; .* leave fewer layers alone"),
        (0.1, {"leave_alone": (0, 1, 2)}, "names every layer"),
        (0.1, {"leave_alone": (5,)}, r"names layers \[5\]; the model has 0 to 2"),
    ],
)
def test_what_cannot_be_had_is_refused(ratio: float, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        gradual(ratio, SelectionConfig(**options))
