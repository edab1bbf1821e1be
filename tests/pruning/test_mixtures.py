from typing import Any

import pytest
import torch
from support.families import EACH, MIXTURES, in_experts, logits_of, tiny_model

from qpruner.anatomy import architecture_of, decoder_layers
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import CompressionPlan
from qpruner.pruning.mixtures import first, gather, keep
from qpruner.pruning.rounds import legal_ratios, prune_
from qpruner.pruning.scores import LayerScores, score_units
from qpruner.pruning.selection import SelectionConfig
from qpruner.pruning.supplies import supplies
from qpruner.pruning.surgery import narrow_


def scored(model: Any) -> list[LayerScores]:
    """Channels of expert e score e + 1, but for the one at place e, which scores 10."""
    by_expert = torch.arange(1.0, 5).repeat_interleave(EACH).double().view(4, EACH)
    by_expert[range(4), range(4)] = 10
    return [LayerScores(torch.ones(4).double(), by_expert.flatten())] * len(decoder_layers(model))


def test_channels_of_a_rank_go_together() -> None:
    model = tiny_model("mixtral")
    layers, scores = decoder_layers(model), scored(model)
    units = gather(scores, layers, "channels")[0].ffn_channels
    assert units.tolist() == [40, *[1 + 2 + 3 + 4] * (EACH - 1)]
    kept = keep(scores, [(4, 2), (4, 1), (3, EACH)], layers, "channels")
    assert kept[0] == ([0, 1, 2, 3], list(in_experts({0: (0, 1), 1: (0, 1), 2: (0, 2), 3: (0, 3)})))
    assert kept[1][1] == list(in_experts({expert: (expert,) for expert in range(4)}))
    assert kept[2] == ([0, 1, 2], list(range(48)))


def test_whole_experts_go_with_all_their_channels() -> None:
    model = tiny_model("mixtral")
    layers, scores = decoder_layers(model), scored(model)
    assert gather(scores, layers, "experts")[0].ffn_channels.tolist() == [10 + 11 * (e + 1) for e in range(4)]
    kept = keep(scores, [(4, 2), (4, 3), (4, 4)], layers, "experts")
    assert [channels for _, channels in kept] == [list(range(24, 48)), list(range(12, 48)), list(range(48))]
    assert first([(2, 3)] * 3, layers, "experts")[0] == ([0, 1], list(range(36)))
    assert first([(2, 3)] * 3, layers, "channels")[0][1] == list(in_experts({e: range(3) for e in range(4)}))


def test_layers_with_a_plain_ffn_have_channels_as_ever() -> None:
    model = tiny_model("qwen3_moe", mlp_only_layers=[1])
    layers, scores = decoder_layers(model), scored(model)
    assert gather(scores, layers, "experts")[1] is scores[1]
    assert keep(scores, [(4, 2), (4, 5), (4, 4)], layers, "experts")[1][1] == [0, 13, 26, 36, 39]
    offers = supplies(model, SelectionConfig(round_to=4, floor=0.25), architecture_of(model.config))
    assert [(offer.ffn_channels, offer.channels_of_unit, offer.least_channels) for offer in offers] == [
        *((12, 4, 4), (48, 1, 12), (12, 4, 4))
    ]
    offers = supplies(model, SelectionConfig(floor=0.25, mixtures="experts"), architecture_of(model.config))
    assert [(offer.ffn_channels, offer.channels_of_unit, offer.least_channels) for offer in offers] == [
        *((4, 12, 2), (48, 1, 12), (4, 12, 2))
    ]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("mixtures", ["channels", "experts"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_pruning_leaves_what_a_plan_says(family: str, mixtures: Any, scope: Any) -> None:
    model = tiny_model(family).requires_grad_(False)
    dense, total = architecture_of(model.config), num_parameters(model)
    plans = [CompressionPlan.dense(dense, None)]

    def narrow(kept: Any) -> None:
        plans.append(plans[-1].keeping(kept))
        narrow_(model, kept)

    selection = SelectionConfig(scope=scope, mixtures=mixtures, floor=0.25, round_to=1)
    offers = supplies(model, selection, dense)
    prune_(
        model,
        dense,
        ratio=0.3,
        rounds=2,
        selection=selection,
        score=lambda network: score_units(network, "magnitude_l2", "sum", None, seed=0),
        narrow=narrow,
    )
    widths = architecture_of(model.config)
    assert plans[-1].widths == widths and len(plans) == 3
    assert 1 - num_parameters(model) / total == pytest.approx(0.3, abs=0.03)
    removed = [
        offer.cost(groups, channels // each)
        for offer, groups, channels, each in zip(
            offers,
            widths.kv_groups,
            widths.ffn_channels,
            [widths.channels_of_each(n) if mixtures == "experts" else widths.num_experts(n) for n in range(3)],
            strict=True,
        )
    ]
    assert sum(removed) == total - num_parameters(model)
    assert min(widths.experts) >= 2
    assert logits_of(model).isfinite().all()


def test_as_many_experts_stay_as_a_token_is_sent_to() -> None:
    model = tiny_model("mixtral", num_experts_per_tok=3)
    selection = SelectionConfig(floor=0.1, mixtures="experts")
    assert {offer.least_channels for offer in supplies(model, selection, architecture_of(model.config))} == {3}
    ratios = list(legal_ratios(model, selection, 0.05))
    assert ratios[-1].ffn_channels == "36"
    with pytest.raises(UserError, match="Layer 0 has 2 experts, but each token is sent to 3 of them"):
        narrow_(model, [(range(4), range(24))] * 3)
