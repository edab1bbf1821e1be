"""What is left out of what libraries say."""

import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

from qpruner.quiet import quieten


def test_the_end_of_a_thread_is_told_but_for_that_of_a_writer_whose_user_hears_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # restored afterwards
    quieten()

    class Writer(_AsyncWriterThread):
        __module__ = _AsyncWriterThread.__module__

    for kind, tells in ((threading.Thread, True), (Writer, False)):
        thread = kind.__new__(kind)
        threading.Thread.__init__(thread, target=Path.read_text, args=[tmp_path])
        thread.run = lambda thread=thread: threading.Thread.run(thread)  # type: ignore[method-assign]
        thread.start()
        thread.join()
        assert ("IsADirectoryError" in capsys.readouterr().err) == tells
