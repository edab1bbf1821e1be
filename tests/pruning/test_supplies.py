"""Which ratios are refused: those with which selection would remove nothing, or would have to remove too much."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import tiny_config

from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.model_folder import build_skeleton
from qpruner.plan import Architecture
from qpruner.pruning.rounds import legal_ratios
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import SelectionConfig, competing_widths, local_widths, num_removed
from qpruner.pruning.supplies import asked_for, round_to, supplies, supplies_for
from qpruner.pruning.surgery import narrow_

Problem = tuple[Any, Architecture, SelectionConfig]
"""A model without weights, its dense widths and how its layers share what is removed."""


def problem(
    *widths: tuple[int, int], groups: int = 4, ffn: int = 256, dense: bool = False, **options: Any
) -> Callable[[], Problem]:
    """A model with given widths of its three layers, of a model with more or, if that is said to be dense, its own."""

    def build() -> Problem:
        model = build_skeleton(tiny_config("llama", num_key_value_heads=groups, intermediate_size=ffn))
        whole = architecture_of(model.config)
        if widths:
            narrow_(model, [(range(kept), range(channels)) for kept, channels in widths])
        return model, whole if dense else architecture_of(model.config), SelectionConfig(**options)

    return build


PROBLEMS = {
    "local": problem(scope="local"),
    "local, first step short": problem(scope="local", ffn=100, round_to=32),
    "local, layers differ": problem((4, 256), (4, 64), (4, 64), scope="local", round_to=32),
    "local, a layer at its floor": problem((4, 128), (4, 256), (4, 256), scope="local", floor=0.5, dense=True),
    "local, groups alone": problem(*[(4, 128)] * 3, scope="local", floor=0.5, dense=True),
    "local, other layers lose groups than channels": problem(
        (2, 256), (2, 256), (4, 128), scope="local", floor=0.5, dense=True
    ),
    "global": problem(),
    "global, first step short": problem(ffn=100, round_to=32),
    "global, groups cheaper": problem(groups=8, round_to=128),
    "global, groups alone": problem(*[(4, 128)] * 3, floor=0.5, dense=True),
    "global, layers at different floors": problem((2, 256), (4, 128), (4, 128), floor=0.5, dense=True),
    "global, a layer left alone": problem(leave_alone=[0]),
    "uniform": problem(uniform=True),
    "uniform, first step short": problem(ffn=100, round_to=32, uniform=True),
    "uniform, groups cheaper": problem(groups=8, round_to=128, uniform=True),
}
each_problem = pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in PROBLEMS.items()])


def removed(model: Any, dense: Architecture, selection: SelectionConfig, remove: int, seed: int) -> int:
    """What selection removes, asked for a number of parameters, with random scores."""
    offers, multiple = supplies(model, selection, dense), round_to(model, selection)
    if selection.scope == "local":
        return num_removed(offers, local_widths(offers, remove, multiple))
    generator = torch.Generator().manual_seed(seed)
    scores = [
        LayerScores(*(torch.rand(n, generator=generator).double() for n in (offer.kv_groups, offer.ffn_channels)))
        for offer in offers
    ]
    return num_removed(offers, competing_widths(scores, offers, remove, multiple, uniform=selection.uniform))


@each_problem
def test_a_ratio_is_refused_if_and_only_if_selection_would_remove_nothing(build: Callable[[], Problem]) -> None:
    model, dense, selection = build()
    total = num_parameters(model)
    with pytest.raises(UserError, match="would remove nothing") as error:
        supplies_for(1e-5, model, selection, dense)
    named = float(re.findall(r"smallest step removes ([\d.]+)%", str(error.value))[0]) / 100
    seen = set()
    for number in range(1, 31):
        ratio = named * number / 20
        gone = removed(model, dense, selection, round(total * ratio), number)
        seen.add(gone)
        if gone:
            supplies_for(ratio, model, selection, dense)
        else:
            with pytest.raises(UserError, match=f"would remove nothing; the smallest step removes {named:.2%} "):
                supplies_for(ratio, model, selection, dense)
    assert 0 in seen
    assert min(seen - {0}) / total == pytest.approx(named, abs=5.1e-5)


@each_problem
def test_all_that_is_listed_is_accepted(build: Callable[[], Problem]) -> None:
    model, _, selection = build()
    found = list(legal_ratios(model, selection, 0.005))
    assert found
    for legal in found:
        supplies_for(legal.ratio, model, selection, architecture_of(model.config))


def test_the_highest_ratio_is_accepted_however_it_is_rounded() -> None:
    model = build_skeleton(tiny_config("llama", vocab_size=17))
    dense, selection = architecture_of(model.config), SelectionConfig(leave_alone=[0], round_to=1)
    removable, total = sum(one.parameters for one in supplies(model, selection, dense)), num_parameters(model)
    assert removable / total * total > removable
    supplies_for(removable / total, model, selection, dense)
    *_, highest = legal_ratios(model, selection, 0.05)
    assert highest.ratio == removable / total
    with pytest.raises(UserError, match="must be above 0 and at most"):
        supplies_for((removable + 1) / total, model, selection, dense)


def test_where_channels_go_one_by_one_nothing_is_finer() -> None:
    model, dense, _ = problem()()
    for multiple, remedy in ((1, r"Ask for more\.$"), (2, r"Ask for more, or lower selection\.round_to\.$")):
        with pytest.raises(UserError, match=remedy):
            supplies_for(1e-5, model, SelectionConfig(round_to=multiple), dense)


def test_a_search_may_start_anywhere_below_the_highest_ratio() -> None:
    model, dense, selection = problem(scope="local")()
    assert supplies_for(1e-5, model, selection, dense, is_start=True) == supplies(model, selection, dense)
    with pytest.raises(UserError, match="must be above 0 and at most"):
        supplies_for(0.99, model, selection, dense, is_start=True)


def test_coarse_steps_are_mentioned() -> None:
    model, dense, _ = problem(ffn=100)()
    step = 3 * 36 * 3 * 64 / num_parameters(model)  # from 100 channels to 64, three weights of 64 each, in three layers
    asked = asked_for(0.2, model, SelectionConfig(scope="local", round_to=64), dense)
    assert asked == f"asked for 20.00%, in steps of {step:.2%} or more"
    assert asked_for(0.2, model, SelectionConfig(round_to=1), dense) == "asked for 20.00%"
