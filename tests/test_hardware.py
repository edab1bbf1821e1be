"""The arithmetic of what fits where, by hand."""

from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import hardware

    return hardware


def test_matrices_of_the_narrowed_down_come_above_the_block(hardware: ModuleType) -> None:
    hidden, ffn = 512, 1408
    given = Namespace(ratio=0.2, bits=4, rank=8, tokens=1024)
    needs = hardware.needs_of((hidden, ffn, 2, 8, 8, 1000), given)
    block = 2 * (4 * hidden**2 + 3 * hidden * ffn + 2 * hidden)
    assert needs.dense == 2 * block + 2 * (2 * 1000 * hidden + hidden)
    assert needs.whole == 2 * needs.dense
    width = ffn - 320  # with 2 of 8 heads in each layer a fifth of all parameters
    assert 2 * (2 * 4 * 64 * hidden + 320 * 3 * hidden) == pytest.approx(0.2 * needs.dense / 2, rel=0.02)
    assert needs.compensation - needs.by_block == 8 * (2 * width**2 + 4 * width * hidden)
    assert needs.by_text - needs.by_block == 8 * (8 * width**2 + 2 * width * hidden)
