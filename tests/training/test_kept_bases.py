"""Bases that are kept by their hashes, and the base of a checkpoint whose folder was moved or is another by now."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support.fits import PRUNING, finetuner, fit, logits, trainer

from qpruner.callbacks import KeepModel, MixedPrecisionQuantization, RunCheckpoint, StructuredPruning
from qpruner.compressed import CompressedModel
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.training.kept_bases import identity_in, keep_by_hash, places_of
from qpruner.training.module import LoRAFinetuner


def fit_in_run(base: Path, data: StoriesDataModule, run: Path, part: str, *, bits: int = 4) -> LoRAFinetuner:
    """A fit whose folder is laid out as that of a run."""
    checkpoint = RunCheckpoint(run / "checkpoints" / "last.ckpt", every_n_steps=2)
    quantization = MixedPrecisionQuantization(bits)
    return fit(finetuner(base), data, quantization, KeepModel(run / part, run / part), checkpoint)


def loaded(run: Path) -> LoRAFinetuner:
    return LoRAFinetuner.load_from_checkpoint(run / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("part", ["model", "base"])
def test_the_checkpoint_of_a_run_that_was_moved_finds_its_base_beside_it(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    expected = logits(fit_in_run(tiny_llama, stories, there, part).model)
    there.rename(here)
    module = loaded(here)
    assert torch.equal(logits(module.model), expected)
    assert module.compressed.kept is not None and module.compressed.kept.path == here / part
    monkeypatch.chdir(here)
    assert torch.equal(logits(loaded(Path()).model), expected)  # also by a path that names none of these folders
    # What lies in the old place by now is another base.
    fit_in_run(tiny_llama, stories, there, part, bits=8)
    assert torch.equal(logits(loaded(here).model), expected)
    # What is given in place of the checkpoint's options holds, as ever.
    with pytest.raises(UserError, match="Use the --model.lora of its run"):
        LoRAFinetuner.load_from_checkpoint(here / "checkpoints" / "last.ckpt", weights_only=True, lora={"r": 4})
    # A base that lies beside the checkpoint and is another one is not taken for it.
    shutil.rmtree(here / part)
    shutil.copytree(there / part, here / part)
    shutil.rmtree(there)
    with pytest.raises(UserError, match=rf"/there/{part}'.* which is not there any more. Put that folder back"):
        loaded(here)


def test_a_fit_goes_on_from_a_run_that_was_moved(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    first = fit_in_run(tiny_llama, stories, tmp_path / "there", "model")
    (tmp_path / "there").rename(tmp_path / "here")
    module = finetuner(tiny_llama)
    path = tmp_path / "here" / "checkpoints" / "last.ckpt"
    trainer(steps=3).fit(module, datamodule=stories, ckpt_path=path, weights_only=True)
    assert module.compressed.identity == first.compressed.identity


@pytest.mark.parametrize("moved", ["with its checkpoint", "alone"])
def test_a_base_that_is_kept_by_its_hash_is_found_where_the_root_is_now(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, moved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.training.compressible.BASES", "bases")
    root, new_root = tmp_path / "root", tmp_path / "new"
    root.mkdir()
    monkeypatch.chdir(root)  # the root of a Trainer that is given none
    checkpoint = root / "fits" / "1" / "last.ckpt"
    pruning = StructuredPruning(**PRUNING)
    module = fit(finetuner(tiny_llama), stories, pruning, RunCheckpoint(checkpoint, every_n_steps=2))
    if moved == "alone":
        new_root.mkdir()
        (root / "bases").rename(new_root / "bases")
    else:
        root.rename(new_root)
        checkpoint = new_root / "fits" / "1" / "last.ckpt"
        found = LoRAFinetuner.load_from_checkpoint(checkpoint, weights_only=True)
        assert torch.equal(logits(found.model), logits(module.model))
    monkeypatch.chdir(new_root)
    resumed = finetuner(tiny_llama)
    trainer(steps=3).fit(resumed, datamodule=stories, ckpt_path=checkpoint, weights_only=True)
    assert resumed.compressed.identity == module.compressed.identity is not None
    assert resumed.compressed.kept is not None and resumed.compressed.kept.path.parent == new_root / "bases"


@pytest.fixture
def dense(tiny_llama: Path) -> CompressedModel:
    return CompressedModel.load(str(tiny_llama), dtype="float32")


def test_what_a_killed_process_left_goes_as_the_next_base_is_kept(dense: CompressedModel, tmp_path: Path) -> None:
    bases, others = tmp_path / "bases", tmp_path / "bases" / "0123456789abcdef"
    for left in (bases / "new", bases / ".new.tmp", others):  # whole but unnamed, half written, and somebody's
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"0" * 100)

    def write(folder: Path) -> None:
        assert not folder.exists()  # gone before anything is written: they take the room
        dense.keep(folder, tokenizer=None)

    place = keep_by_hash(bases, write)
    assert sorted(path.name for path in bases.iterdir() if path.is_dir()) == sorted([place.name, others.name])
    assert str(identity_in(place)).startswith(place.name) and len(place.name) == 16


def test_the_base_that_another_process_is_writing_stays(dense: CompressedModel, tmp_path: Path) -> None:
    written = tmp_path / "new" / "model.safetensors"
    written.parent.mkdir()
    written.write_bytes(b"half")
    with ThreadPoolExecutor() as pool:
        with FileLock(tmp_path / ".lock"):  # of the other
            waiting = pool.submit(keep_by_hash, tmp_path, lambda folder: dense.keep(folder, tokenizer=None))
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            assert written.read_bytes() == b"half"
        place = waiting.result(timeout=60)
    assert identity_in(place) is not None and not written.exists()


def test_the_places_in_their_order() -> None:
    places = places_of("0123456789abcdef" * 4, Path("/a/b/checkpoints/last.ckpt"), [Path("/root")], "bases")
    assert [str(place) for place in places] == [
        "/a/b/model",
        "/a/b/base",
        "/root/bases/0123456789abcdef",
        "/a/b/checkpoints/bases/0123456789abcdef",
        "/a/b/bases/0123456789abcdef",
        "/a/bases/0123456789abcdef",
        "/bases/0123456789abcdef",
    ]
    assert [*places_of("01", None, [], "bases")] == []


def test_a_folder_without_a_base_has_no_identity(tmp_path: Path) -> None:
    assert identity_in(tmp_path / "nothing") is None
