from pathlib import Path

import pytest
import yaml

from qpruner.errors import UserError
from qpruner.records.folder import RunConfig, RunFolder
from qpruner.runs.claim import changed_options, claim_folder, lock_folder

CONFIG = {"model": {"lora": {"r": 8}}, "trainer": {"max_steps": 5}, "run": {"name": "x"}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder.of(RunConfig(name="x", dir=str(tmp_path)))
    folder.path.mkdir()
    return folder


def begin(folder: RunFolder) -> None:
    folder.checkpoint.parent.mkdir(exist_ok=True)
    folder.checkpoint.touch()


def test_the_same_options_continue_a_run_that_has_begun(folder: RunFolder) -> None:
    assert claim_folder(folder, CONFIG, restart=False) is False
    assert yaml.safe_load(folder.config.read_text()) == CONFIG
    begin(folder)
    assert claim_folder(folder, CONFIG, restart=False) is True


def test_changed_options_are_refused_by_name(folder: RunFolder) -> None:
    claim_folder(folder, CONFIG, restart=False)
    begin(folder)
    other = {"model": {"lora": {"r": 4}}, "trainer": {"max_steps": 5, "precision": "bf16"}, "run": {"name": "x"}}
    with pytest.raises(UserError) as caught:
        claim_folder(folder, other, restart=False)
    text = str(caught.value)
    assert "model.lora.r: was 8, is now 4" in text
    assert "trainer.precision: was None, is now bf16" in text
    assert "max_steps" not in text
    assert "--restart" in text and "--run.name" in text
    assert yaml.safe_load(folder.config.read_text()) == CONFIG


def test_options_that_change_no_number_may_change(folder: RunFolder) -> None:
    claim_folder(folder, CONFIG, restart=False)
    begin(folder)
    free = {"restart": True, "run": {"name": "y", "dir": "z"}, "data": {"init_args": {"loader": {"num_workers": 2}}}}
    assert changed_options(CONFIG, {**CONFIG, **free}) == {}
    assert changed_options(CONFIG, {**CONFIG, "seed_everything": 1}) == {"seed_everything": (None, 1)}
    # An empty group is an option like any other.
    assert changed_options({"a": {}}, {"a": {"b": 1}}) == {"a": ({}, None), "a.b": (None, 1)}


def test_a_run_that_measured_nothing_may_change_its_options(folder: RunFolder) -> None:
    claim_folder(folder, CONFIG, restart=False)
    folder.manifest.write_text("{}")
    assert claim_folder(folder, {"model": 1}, restart=False) is False
    assert yaml.safe_load(folder.config.read_text()) == {"model": 1}
    assert not folder.manifest.exists()


def test_restart_removes_what_the_run_left_and_nothing_else(folder: RunFolder) -> None:
    claim_folder(folder, CONFIG, restart=False)
    begin(folder)
    folder.summary.write_text('{"finished": true}')
    assert folder.finished
    thesis = folder.path / "thesis.txt"
    thesis.write_text("years of work")
    assert claim_folder(folder, {"other": 1}, restart=True) is False
    assert not folder.checkpoint.exists() and not folder.finished
    assert thesis.read_text() == "years of work"
    assert yaml.safe_load(folder.config.read_text()) == {"other": 1}


def test_two_processes_cannot_work_in_one_folder(folder: RunFolder) -> None:
    lock = lock_folder(folder)
    with pytest.raises(UserError, match="Another process is working"):
        lock_folder(folder)
    lock.release()
    lock_folder(folder).release()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write the run folder.*--run.dir"):
        lock_folder(RunFolder(tmp_path / "file" / "run"))


@pytest.mark.parametrize("damage", [b"\xff", b"a: [", b"[1]", b"3", b"\0"])
def test_damaged_options_are_named_and_can_be_thrown_away(tmp_path: Path, damage: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_bytes(damage)
    with pytest.raises(UserError, match=r"config.yaml'.*Restore the file, or start the run anew with --restart\.$"):
        claim_folder(folder, {"a": 1}, restart=False)
    assert not claim_folder(folder, {"a": 1}, restart=True)
    assert folder.read_config() == {"a": 1}
