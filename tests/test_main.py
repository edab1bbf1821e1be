"""The status that a command ends with."""

from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qpruner.__main__ import main
from qpruner.errors import UserError


@pytest.mark.parametrize(
    ("ended_by", "status"),
    [
        (SIGTERMException(), 143),  # 128 and the number of the signal
        (KeyboardInterrupt(), 130),
        (UserError("A mistake."), 2),
        (SystemExit(0), 0),
        (SystemExit(1), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_only_success_ends_with_zero(ended_by: BaseException, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> Any:
        raise ended_by

    monkeypatch.setattr("qpruner.__main__.quieten", lambda: None)  # for all that this process logs after it
    monkeypatch.setattr("qpruner.__main__.run", run)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == status
