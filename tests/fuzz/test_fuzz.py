"""Whatever happened to a file: it is read as something sane, or refused in a few words that name it.

Each case is drawn from its number alone, so a failure is repeated by its name, such as
``pytest "tests/fuzz/test_fuzz.py::test_damage[plan-17]"``.
"""

import logging
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
from targets import TARGETS

from qpruner.errors import UserError

SECONDS, BYTES = 20, 2 * 2**30
LONGEST = 1000
CASES, OF_THESE_QUICK = 2000 // len(TARGETS), 100 // len(TARGETS)


class TooLong(BaseException):
    """No `Exception`, so that nothing takes it for a mistake in the file."""


@contextmanager
def limits() -> Iterator[None]:
    """Ends what is inside when it takes too long or, where the system can say so, too much more memory."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before, soft_and_hard = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    usage = Path("/proc/self/statm")
    if usage.exists():
        size = int(usage.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, soft_and_hard[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, soft_and_hard)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a target as it is made, which was read once to see that it can be."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        TARGETS[name].make(folder)
        read = folder.with_name(f"{folder.name}_read")
        shutil.copytree(folder, read)
        TARGETS[name].use(read)
        return folder

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=[pytest.mark.slow] if case >= OF_THESE_QUICK else [])
        for name in TARGETS
        for case in range(CASES)
    ],
)
def test_damage(name: str, case: int, whole: Callable[[str], Path], tmp_path: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    place = tmp_path / "case"
    shutil.copytree(whole(name), place)
    damage = TARGETS[name].damage(Random(f"{name} {case}"), place)
    try:
        with limits():
            TARGETS[name].use(place)
    except UserError as error:
        said = str(error)
        assert len(said) < LONGEST, f"{damage}: {said}"
        assert any(word in said for word in TARGETS[name].named(damage, place)), f"{damage}: {said}"
    finally:
        shutil.rmtree(place)
