import shutil
from pathlib import Path

import pytest

from qpruner.errors import UserError
from qpruner.records.folder import Part, RunConfig, RunFolder


def parts() -> list[Part]:
    return [part for part in vars(RunFolder).values() if isinstance(part, Part)]


def make_every_part(folder: RunFolder) -> list[Path]:
    """Files and folders of all parts, those of an earlier phase and of writing that was cut off among them."""
    paths = []
    for part in parts():
        places = [folder, RunFolder(folder.path, 1)] if part.of_phase else [folder]
        paths += [part.__get__(place, RunFolder) for place in places]
        paths += [folder.path / f".{part.name}.tmp", folder.path / f".{part.name}.123.tmp"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "." in path.name.removesuffix(".tmp").strip("."):
            path.write_text("{}")
        else:
            (path / "inside").mkdir(parents=True, exist_ok=True)
    return paths


def test_clearing_removes_every_part_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    paths = make_every_part(folder)
    assert {"test.json", "validate.json", "predictions.jsonl", "run.log", "checkpoints"} <= {
        path.name for path in paths
    }
    others = [tmp_path / name for name in ("thesis.txt", ".lock", "model.bak", ".notes.tmp", "summary.json.orig")]
    for path in others:
        path.write_text("years of work")
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(folder.tensorboard)
    folder.tensorboard.symlink_to(elsewhere)
    folder.clear()
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert elsewhere.is_dir()


def test_parts_of_a_phase_lie_in_its_folder(tmp_path: Path) -> None:
    last, first = RunFolder(tmp_path), RunFolder(tmp_path, 1)
    assert (last.model, first.model) == (tmp_path / "model", tmp_path / "phases" / "1" / "model")
    assert first.summary == last.summary == tmp_path / "summary.json"
    assert first.checkpoint == tmp_path / "phases" / "1" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="run.name"):
        RunConfig(name=name)


def test_what_lies_among_the_phases_is_no_phase(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name in ("1", "2", "10", "1.bak", "notes"):
        (folder.phases / name).mkdir(parents=True)
    assert [phase.phase for phase in folder.all_phases] == [1, 2, 10, None]


@pytest.mark.parametrize("content", ['{"finished": -1}', '{"finished": "1"}', '{"finished": true}', "{}", "[1]", ""])
def test_a_number_of_phases_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    folder.phases.mkdir()
    (folder.phases / "finished.json").write_text(content)
    with pytest.raises(UserError, match="finished.json"):
        _ = folder.finished_phases
