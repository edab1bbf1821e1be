"""What `qpruner plan` says of orders and of leading columns; tests/test_commands.py has the rest."""

from dataclasses import replace
from pathlib import Path

import pytest

from qpruner.commands import run
from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, LayerPlan, Leading, Precision

MODEL = Architecture("llama", 8, 2, 2, (3, 3), (9, 9))
LED = Precision("affine-double", 2, 64, Leading(3, Precision("int8", 8)))
UNTOUCHED = LayerPlan((0, 1, 2), tuple(range(9)), dict.fromkeys(UNITS, DENSE))
PLAN = CompressionPlan(
    MODEL,
    None,
    (LayerPlan((2, 0), (5, 8, 0, 1, 2), {**dict.fromkeys(UNITS, DENSE), "down": LED}), UNTOUCHED),
    hidden=(7, *range(7)),
)


def test_show_says_what_leads_and_what_is_reordered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PLAN.write(tmp_path / "plan.json")
    run(["plan", "show", str(tmp_path / "plan.json")])
    told = capsys.readouterr().out
    assert "head dense 16. Hidden channels are reordered: 7 0-6.\n" in told
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in told.splitlines()[-2:]]
    assert rows == [
        ["0", "2 of 3, reordered", "5 of 9, reordered", *["dense 16"] * 3, "3 columns int8 8, then affine-double 2/64"],
        ["1", "3 of 3", "9 of 9", *["dense 16"] * 4],
    ]


def test_ranks_of_adapters_are_shown_where_a_layer_has_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranked = PLAN.with_ranks([None, 4])
    ranked.write(tmp_path / "plan.json")
    run(["plan", "show", str(tmp_path / "plan.json")])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[-4][-1] == "rank" and [row[-1] for row in rows[-2:]] == ["lora.r", "4"]
    PLAN.write(tmp_path / "before")
    with pytest.raises(SystemExit):
        run(["plan", "diff", str(tmp_path / "before"), str(tmp_path / "plan.json")])
    assert capsys.readouterr().out == "layer 1: rank of the adapters lora.r becomes 4\n"


def test_diff_says_what_stands_in_another_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = replace(PLAN.layers[0], kv_groups=(0, 2), ffn_channels=(8, 5, 0, 1), precision=UNTOUCHED.precision)
    other = replace(PLAN, layers=(first, UNTOUCHED), hidden=None)
    for name, plan in (("before", PLAN), ("after", other)):
        plan.write(tmp_path / name)
    with pytest.raises(SystemExit) as ended:
        run(["plan", "diff", str(tmp_path / "before"), str(tmp_path / "after")])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "order of the hidden channels 7 0-6 becomes as in the model",
        "layer 0: KV groups stand in another order, 0 2",
        "layer 0: FFN channels 2 no longer kept",
        "layer 0: FFN channels stand in another order, 8 5 0-1",
        "layer 0: down 3 columns int8 8, then affine-double 2/64 becomes dense 16",
    ]


def test_units_that_only_go_leave_the_others_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = replace(PLAN, layers=(replace(PLAN.layers[0], ffn_channels=(5, 0, 1, 2)), UNTOUCHED))
    for name, plan in (("before", PLAN), ("after", fewer)):
        plan.write(tmp_path / name)
    with pytest.raises(SystemExit):
        run(["plan", "diff", str(tmp_path / "before"), str(tmp_path / "after")])
    assert capsys.readouterr().out == "layer 0: FFN channels 8 no longer kept\n"
