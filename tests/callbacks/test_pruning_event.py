"""What an event says, of shares counted by hand."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from support.families import tiny_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpruner.anatomy import architecture_of, num_linear_parameters
from qpruner.callbacks.pruning_event import PruningEvent
from qpruner.memory import num_parameters
from qpruner.pruning.gradual import GradualPruning
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import SelectionConfig

LAYERS = 3


@pytest.fixture
def gradual() -> GradualPruning:
    model = tiny_model("llama")
    return GradualPruning.of(model, 0.2, SelectionConfig(scope="local"), architecture_of(model.config))


def event(gradual: GradualPruning, **changes: object) -> PruningEvent:
    """One KV group less in the second layer, and 3 and 5 FFN channels less in the first and the third."""
    dense = gradual.dense[0]
    groups, channels = list(range(dense.kv_groups)), list(range(dense.ffn_channels))
    values = {
        "step": 20,
        "gradual": gradual,
        "kept": [(groups, channels[3:]), (groups[1:], channels), (groups, channels[:-5])],
        "scores": [LayerScores(torch.ones(len(groups)), torch.arange(1.0, 1 + len(channels)))] * LAYERS,
        "agreement": None,
        "skipped": 0,
    }
    return PruningEvent(**(values | changes))  # type: ignore[arg-type]


def removed(gradual: GradualPruning) -> int:
    """By the shapes of the model: a channel is a row of two matrices and a column of one; a group has two heads of its
    own for queries and output, and one for keys and values."""
    model = tiny_model("llama")
    hidden = model.config.hidden_size
    head = model.model.layers[0].self_attn.head_dim
    queries = model.config.num_attention_heads // model.config.num_key_value_heads
    return 8 * 3 * hidden + head * hidden * 2 * (queries + 1)


def test_shares_are_of_all_parameters_and_of_the_linears(gradual: GradualPruning) -> None:
    model = tiny_model("llama")
    assert event(gradual).shares == (
        pytest.approx(removed(gradual) / num_parameters(model)),
        pytest.approx(removed(gradual) / num_linear_parameters(model)),
    )
    everything = [(list(range(s.kv_groups)), list(range(s.ffn_channels))) for s in gradual.dense]
    assert event(gradual, kept=everything).shares == (0.0, 0.0)


def test_a_line_tells_a_person(gradual: GradualPruning) -> None:
    of_all, of_linears = event(gradual).shares
    groups, channels = gradual.dense[0].kv_groups, gradual.dense[0].ffn_channels
    assert event(gradual).line == (
        f"Step 20: {of_all:.2%} of all parameters are masked, {of_linears:.2%} of the decoder linears; "
        f"layers keep {groups - 1}-{groups} KV groups and {channels - 5}-{channels} FFN channels."
    )
    more = event(gradual, agreement=0.754, skipped=2).line
    assert more.startswith(event(gradual).line.removesuffix("."))
    assert more.endswith(", 75% of what went as the scores before had it, 2 steps skipped for gradients that were not finite.")  # fmt: skip  # noqa: E501


def test_tensorboard_has_shares_of_all_and_of_each_layer_and_scores_of_what_lives(
    gradual: GradualPruning, tmp_path: Path
) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="")
    event(gradual, agreement=0.5, skipped=1).log([board])
    board.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    logged = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    of_all, of_linears = event(gradual).shares
    groups, channels = gradual.dense[0].kv_groups, gradual.dense[0].ffn_channels
    expected = {
        "pruning/ratio": of_all,
        "pruning/ratio_of_linears": of_linears,
        "pruning/skipped_steps": 1.0,
        "pruning/agreement": 0.5,
    }
    shares = {"kv_groups": (1, 1 - 1 / groups, 1), "ffn_channels": (1 - 3 / channels, 1, 1 - 5 / channels)}
    for kind, of_layers in shares.items():
        expected |= {f"pruning/kept_{kind}/layer_{number:02}": share for number, share in enumerate(of_layers)}
    assert {tag: pytest.approx(value) for tag, value in expected.items()} == {
        tag: value for tag, ((_, value),) in logged.items() if tag != "epoch"
    }
    assert {step for of_tag in logged.values() for step, _ in of_tag} == {20}
    tags = events.Tags()["histograms"]
    assert len(tags) == 2 * LAYERS
    (first,) = events.Histograms("pruning/log10_scores_ffn_channels/layer_00")
    living = torch.arange(4.0, 1 + channels).log10()  # the three lowest are gone
    expected_of_living = [float(value) for value in (living.min(), living.max(), living.sum())]
    seen = first.histogram_value
    assert (first.step, seen.num) == (20, len(living))
    assert [seen.min, seen.max, seen.sum] == pytest.approx(expected_of_living, rel=1e-5)


def test_a_score_of_zero_has_a_logarithm_all_the_same(gradual: GradualPruning, tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path, name="", version="")
    supply = gradual.dense[0]
    zero = LayerScores(torch.zeros(supply.kv_groups), torch.zeros(supply.ffn_channels))
    event(gradual, scores=[zero] * LAYERS).log([board])
    board.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (seen,) = events.Histograms("pruning/log10_scores_kv_groups/layer_00")
    assert seen.histogram_value.min == pytest.approx(-37.93, abs=0.01)  # of the smallest normal number


def test_other_loggers_get_the_shares_alone(gradual: GradualPruning, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    event(gradual).log([logger])
    logger.save()
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert values["step"] == "20" and float(values["pruning/ratio"]) == pytest.approx(event(gradual).shares[0])
    assert "pruning/agreement" not in values  # there was no event before
