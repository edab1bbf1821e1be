"""The status that a command ends with."""

import signal
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qpruner.__main__ import main
from qpruner.errors import UserError


def test_an_interrupted_fit_ends_with_the_status_of_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise KeyboardInterrupt

    def run(arguments: list[str]) -> None:
        trainer = Trainer(
            accelerator="cpu", max_steps=1, callbacks=[Interrupted()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(BoringModel())

    monkeypatch.setattr("qpruner.__main__.quieten", lambda: None)
    monkeypatch.setattr("qpruner.__main__.run", run)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores the signal from then on
    assert caught.value.code == 130


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
