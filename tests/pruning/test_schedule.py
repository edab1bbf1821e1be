"""When how much is pruned, by hand."""

import math
from typing import Any

import pytest

from qpruner.errors import UserError
from qpruner.pruning.schedule import CubicSchedule


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0), (1, 0), (10, 0), (30, 1 - 0.75**3), (50, 0.875), (70, 1 - 0.25**3), (89, 1 - (1 / 80) ** 3), (90, 1)],
)
def test_the_share_by_hand(step: int, share: float) -> None:
    assert CubicSchedule().share(step, 100) == pytest.approx(share, abs=1e-12)


def test_the_share_is_nothing_before_and_everything_after_and_never_falls() -> None:
    schedule = CubicSchedule(warmup=0.2, cooldown=0.3)
    shares = [schedule.share(step, 50) for step in range(60)]
    assert shares[:11] == [0.0] * 11 and shares[35:] == [1.0] * 25
    assert all(a < b for a, b in zip(shares[10:35], shares[11:36], strict=True))


@pytest.mark.parametrize(
    ("schedule", "steps", "events"),
    [
        (CubicSchedule(), 100, [20, 30, 40, 50, 60, 70, 80, 90]),
        (CubicSchedule(every_n_steps=25), 100, [25, 50, 75, 90]),
        (CubicSchedule(every_n_steps=40, cooldown=0.15), 100, [40, 80, 85]),
        (CubicSchedule(warmup=0.5, cooldown=0, every_n_steps=20), 100, [60, 80, 100]),
        (CubicSchedule(warmup=0, cooldown=0, every_n_steps=4), 10, [4, 8, 10]),
        (CubicSchedule(warmup=0, cooldown=0.5, every_n_steps=1), 6, [1, 2, 3]),
    ],
)
def test_events_are_multiples_in_between_and_the_start_of_the_cool_down(
    schedule: CubicSchedule, steps: int, events: list[int]
) -> None:
    schedule.check(steps)
    assert [step for step in range(steps + 5) if schedule.is_event(step, steps)] == events
    assert schedule.share(events[-1], steps) == 1 and schedule.last(steps) == events[-1]
    assert all(0 < schedule.share(event, steps) < 1 for event in events[:-1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"warmup": -0.1}, r"warmup is -0.1 .*in \[0, 1\), together less than 1"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"cooldown": 1.0, "warmup": 0}, "cooldown 1.0"),
        ({"cooldown": -1}, "cooldown -1"),
        ({"cooldown": math.nan}, "cooldown nan"),
        ({"warmup": 0.5, "cooldown": 0.5}, "warmup is 0.5 and schedule.cooldown 0.5"),
        ({"every_n_steps": 0}, "every_n_steps is 0; it is at least 1"),
    ],
)
def test_impossible_options_are_refused_when_they_are_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CubicSchedule(**options)


def test_a_schedule_longer_than_the_fit_is_refused() -> None:
    """Between 10 and 90 lie 80 steps."""
    CubicSchedule(every_n_steps=79).check(100)
    with pytest.raises(
        UserError, match=r"every_n_steps is 80, .* lie 80 of the fit's 100 optimizer steps. Train longer, or lower"
    ):
        CubicSchedule(every_n_steps=80).check(100)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_fit_of_no_steps_is_refused(steps: int) -> None:
    with pytest.raises(UserError, match=f"of the fit's {steps} optimizer steps"):
        CubicSchedule(every_n_steps=1).check(steps)


@pytest.mark.parametrize("steps", [math.inf, -1])
def test_an_endless_fit_is_refused(steps: float) -> None:
    with pytest.raises(UserError, match=r"The fit has no end.*--trainer.max_steps or --trainer.max_epochs"):
        CubicSchedule().check(steps)
