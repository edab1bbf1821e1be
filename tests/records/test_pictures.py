"""What the pictures of a run show, read back from their axes."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.families import KEPT, tiny_config
from support.figures import cells, curves, texts, tick_labels, widths

from qpruner.anatomy import architecture_of
from qpruner.plan import DENSE, UNITS, CompressionPlan, Leading, Precision
from qpruner.records.pictures import loss_figure, plan_figure, ratio_figure, save_figure

TRAIN, VALIDATION = [(0, 3.0), (1, 2.5), (2, 2.25)], [(1, 2.75)]


def borders_of(figure: Figure) -> list[float]:
    return [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]  # type: ignore[index]


def test_losses_are_drawn_as_they_were_logged_with_a_line_where_a_phase_begins() -> None:
    figure = loss_figure({"train/loss": TRAIN, "val/loss": VALIDATION, "nothing": []}, borders=[2, 7])
    (axes,) = figure.axes
    shown = curves(axes)
    assert (shown["train/loss"], shown["val/loss"]) == (TRAIN, VALIDATION) and "nothing" not in shown
    assert borders_of(figure) == [2, 7]
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["train/loss", "val/loss"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss (nats per token)")


@pytest.mark.parametrize(("length", "marker"), [(19, "o"), (20, "None")])
def test_points_of_short_curves_can_be_told_apart(length: int, marker: str) -> None:
    (axes,) = loss_figure({"train/loss": [(step, 1.0) for step in range(length)]}).axes
    assert axes.lines[0].get_marker() == marker


def test_the_ratio_begins_at_nothing_and_stays_until_the_next_event() -> None:
    figure = ratio_figure([(2, 0.05), (4, 0.08)], borders=[6])
    (axes,) = figure.axes
    assert curves(axes)["_child0"] == [(0, 0.0), (2, 0.05), (4, 0.08)]
    assert axes.lines[0].get_drawstyle() == "steps-post" and axes.get_ylim()[0] == 0
    assert borders_of(figure) == [6]
    assert axes.yaxis.get_major_formatter()(0.08, None) == "8%"


def plan() -> CompressionPlan:
    """Layers keep 3, 1 and 4 of 4 KV groups and 37, 23 and 1 of 48 channels."""
    return CompressionPlan.dense(architecture_of(tiny_config("llama")), None).keeping(KEPT)


def test_a_pruned_plan_shows_what_each_layer_keeps_from_the_top() -> None:
    groups, channels = plan_figure(plan()).axes
    # The grey wholes, then the shares.
    assert widths(groups) == [1, 1, 1, 3 / 4, 1 / 4, 4 / 4]
    assert widths(channels) == [1, 1, 1, 37 / 48, 23 / 48, 1 / 48]
    assert texts(groups) == ["3 of 4", "1 of 4", "4 of 4"]
    assert texts(channels) == ["37 of 48", "23 of 48", "1 of 48"]
    assert tick_labels(groups.yaxis) == ["0", "1", "2"] and groups.get_ylim() == channels.get_ylim() == (2.5, -0.5)


def test_a_quantized_plan_shows_the_bits_of_every_unit_too() -> None:
    nf4, int8 = Precision("nf4", 4, 64), Precision("int8", 8)
    precision = [dict(zip(UNITS, one, strict=True)) for one in ([nf4] * 4, [int8, nf4, DENSE, int8], [DENSE] * 4)]
    groups, channels, bits = plan_figure(plan().with_precision(precision)).axes
    assert widths(groups)[3:] == [3 / 4, 1 / 4, 4 / 4]
    assert cells(bits) == [[4] * 4, [8, 4, 16, 8], [16] * 4]
    assert texts(bits) == ["4"] * 4 + ["8", "4", "16", "8"] + ["16"] * 4
    assert tick_labels(bits.xaxis) == list(UNITS) and bits.get_xlabel() == "embedding 16, head 16"


def test_bits_of_two_segments_are_their_mean() -> None:
    led = Precision("affine", 3, leading=Leading(16, Precision("int8", 8)))
    shown = plan().with_precision([dict.fromkeys(UNITS, led)] + [dict.fromkeys(UNITS, DENSE)] * 2, embedding=led)
    _, _, bits = plan_figure(shown).axes
    # 16 columns of 8 bits, of 64 of the hidden states, of three KV groups of 32 each and of 37 FFN channels.
    assert cells(bits)[0] == pytest.approx([3 + 5 * 16 / columns for columns in (64, 96, 64, 37)])
    assert texts(bits)[:4] == ["4.25", "3.83", "4.25", "5.16"]
    assert bits.get_xlabel() == "embedding 4.25, head 16"


def test_a_picture_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loss.png"
    save_figure(loss_figure({"train/loss": TRAIN}), path)
    assert imread(path).shape[:2] == (4 * 120, 7 * 120)
    before = path.read_bytes()

    def half(figure: Figure, file: Path, **_: object) -> None:
        file.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="no space left"):
        save_figure(ratio_figure([(1, 0.1)]), path)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
