"""The log of a run: what goes there, and until when."""

import logging
from pathlib import Path

from qpruner.records.log import log_to


def test_what_is_logged_goes_there_until_it_is_stopped(tmp_path: Path) -> None:
    path, ours = tmp_path / "run.log", logging.getLogger("qpruner.somewhere")
    ours.warning("before")
    stop = log_to(path)
    ours.warning("inside")
    logging.getLogger("lightning.pytorch.somewhere").warning("of Lightning")
    logging.getLogger("another").warning("of others")
    stop()
    ours.warning("after")
    lines = path.read_text().splitlines()
    assert [line.partition(" WARNING ")[2] for line in lines] == [
        "qpruner.somewhere: inside",
        "lightning.pytorch.somewhere: of Lightning",
    ]


def test_it_goes_on_in_a_new_file_where_a_run_begins_anew(tmp_path: Path) -> None:
    path, ours = tmp_path / "run.log", logging.getLogger("qpruner")
    stop = log_to(path)
    ours.warning("first")
    path.unlink()
    ours.warning("second")
    stop()
    assert "first" not in path.read_text() and "second" in path.read_text()
