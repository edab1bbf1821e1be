"""Seconds of plans: sums of a table, and what is measured once."""

import math
from pathlib import Path

import pytest
import torch

from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS, Architecture, CompressionPlan, Precision
from qpruner.search.speed import TOKENS, Linear, Speeds, Timer, linears_of, measured, name_of, seconds_of

CPU = torch.device("cpu")
FOUR = Precision("nf4", 4, 64)
WHOLE = CompressionPlan.dense(Architecture("llama", 32, 8, 1, (2, 2), (48, 48)), None)
NARROW = WHOLE.keeping([((0,), range(40)), ((0, 1), range(48))]).with_precision(
    [{**dict.fromkeys(UNITS, DENSE), "down": FOUR}, dict.fromkeys(UNITS, DENSE)]
)


def timer(asked: list[Linear]) -> Timer:
    """Seconds that are the weights, and twice as many for more tokens; half of all in four bits."""

    def seconds(linear: Linear, device: torch.device, dtype: torch.dtype) -> tuple[float, ...]:
        asked.append(linear)
        rows, columns, precision = linear
        weights = rows * columns * (0.5 if precision == FOUR else 1.0)
        return weights, 2 * weights

    return seconds


def test_the_seconds_of_a_plan_are_the_sum_over_its_linears(tmp_path: Path) -> None:
    assert linears_of(WHOLE) == {
        (16, 32, DENSE): 6, (32, 16, DENSE): 2, (48, 32, DENSE): 4, (32, 48, DENSE): 2,
    }  # fmt: skip
    speeds = measured(tmp_path / "speeds.json", [WHOLE, NARROW], CPU, torch.float32, timer([]))
    whole = 2 * (4 * 16 * 32 + 3 * 48 * 32)
    assert speeds.per_token(WHOLE) == {"1": whole, "256": 2 * whole / 256}
    narrow = whole / 2 + 4 * 8 * 32 + 2 * 40 * 32 + 0.5 * 40 * 32
    assert speeds.per_token(NARROW)["1"] == narrow


def test_what_is_known_of_the_same_device_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "structure" / "speeds.json", list[Linear]()
    measured(path, [WHOLE], CPU, torch.float32, timer(asked))
    assert sorted(asked, key=str) == sorted(linears_of(WHOLE), key=str)
    asked.clear()
    both = measured(path, [WHOLE, NARROW], CPU, torch.float32, timer(asked))
    assert {*asked} == {*linears_of(NARROW)} - {*linears_of(WHOLE)}
    asked.clear()
    assert measured(path, [NARROW], CPU, torch.float32, timer(asked)) == both and not asked
    measured(path, [WHOLE], CPU, torch.bfloat16, timer(asked))  # in another number format all is measured
    assert len(asked) == 4
    path.write_text(path.read_text()[:30])
    asked.clear()
    measured(path, [WHOLE], CPU, torch.float32, timer(asked))
    assert len(asked) == 4


@pytest.mark.parametrize("precision", [DENSE, FOUR], ids=str)
def test_a_pass_of_more_tokens_through_a_wider_linear_takes_longer(precision: Precision) -> None:
    small, large = (seconds_of((size, size, precision), CPU, torch.float32) for size in (64, 1024))
    assert len(small) == len(TOKENS) and all(0 < one < math.inf for one in small)
    assert large[1] > 2 * small[1]


def test_seconds_that_cannot_be_are_refused() -> None:
    for wrong in ((1.0,), (1.0, 0.0), (1.0, math.nan)):
        with pytest.raises(UserError, match="2 numbers above 0"):
            Speeds("cpu", {name_of((1, 2, DENSE)): wrong})
