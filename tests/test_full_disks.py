"""A disk that is full in the middle of each kind of write, and whole runs on disks that are too small."""

import errno
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from support.disks import files_end_at
from support.evaluations import items_of
from support.exports import source_of
from support.families import adapted, tiny_model
from support.fits import finetuner, trainer
from support.quantized import INT8, pruned, settings
from torch.utils.tensorboard import SummaryWriter

from qpruner.adapter_files import save_adapters
from qpruner.callbacks import RunCheckpoint
from qpruner.commands import run
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.cache import Prepared, store
from qpruner.datamodules.rows import TokenRows
from qpruner.dense_copy import merge_run
from qpruner.errors import UserError
from qpruner.export.exporting import export_model
from qpruner.files import write_json
from qpruner.model_folder import save_base
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.processes import Processes
from qpruner.quantization.bank import fill_folder
from qpruner.quantization.calibrated_layers import CalibratedLayers, RoundedLinear
from qpruner.records.evaluation import write_items
from qpruner.records.folder import RunFolder
from qpruner.records.log import log_to
from qpruner.records.pictures import save_figure
from qpruner.search.ledger import Ledger
from qpruner.search.reference import Reference
from qpruner.training.kept_bases import keep_by_hash

Write = Callable[[], object]


def json_file(folder: Path) -> Write:
    return lambda: write_json(folder / "a.json", {"numbers": [*range(999)]})


def tokens(folder: Path) -> Write:
    rows = TokenRows(torch.arange(999), torch.ones(999).bool(), torch.ones(999).int(), torch.tensor([0, 999]))
    return lambda: store(folder / "tokens.safetensors", Prepared({"test": rows}, ()))


def bank(folder: Path) -> Write:
    model, _ = pruned("llama")
    return lambda: fill_folder(folder, model, [INT8], settings(), base="ab", processes=Processes.alone())


def calibrated_layer(folder: Path) -> Write:
    layer = {"q_proj": RoundedLinear({"codes": torch.zeros(999)}, None, None)}
    return lambda: CalibratedLayers(folder, {}).write(0, layer, Processes.alone())


def reference(folder: Path) -> Write:
    said = Reference("ab", ({"input_ids": torch.zeros(2, 9).long()},), torch.zeros(99, 99))
    return lambda: said.write(folder / "reference.safetensors")


def model_folder(folder: Path) -> Write:
    model, plan = pruned("llama")
    return lambda: save_base(folder / "model", model, plan, base_name="tiny", tokenizer=load_tokenizer(EMBEDDED))


def base_by_hash(folder: Path) -> Write:
    model, plan = pruned("llama")
    return lambda: keep_by_hash(
        folder / "bases", partial(save_base, model=model, plan=plan, base_name="tiny", tokenizer=None)
    )


def adapters(folder: Path) -> Write:
    source_of(folder / "model", precision=INT8)
    model = adapted(tiny_model("llama"))
    return lambda: save_adapters(folder / "model", model, trained=True)


def merged(folder: Path) -> Write:
    source_of(folder / "from", precision=INT8, lora={})
    return lambda: merge_run(folder / "from", folder / "merged", "bfloat16")


def exported(name: str, folder: Path) -> Write:
    source_of(folder / "from", precision=INT8, lora={}, tokenizer=load_tokenizer(EMBEDDED), vocab_size=2048)
    return lambda: export_model(folder / "from", name, folder / "exported", "auto")


def picture(folder: Path) -> Write:
    figure = Figure()
    figure.subplots().plot([1, 2])
    return lambda: save_figure(figure, folder / "a.png")


def items(folder: Path) -> Write:
    return lambda: write_items(folder / "items" / "boolq.jsonl", items_of([True, False] * 50))


KINDS = {
    "JSON": json_file,
    "tokens": tokens,
    "bank": bank,
    "calibrated layer": calibrated_layer,
    "reference": reference,
    "model": model_folder,
    "base by hash": base_by_hash,
    "adapters": adapters,
    "merged copy": merged,
    "GGUF": partial(exported, "gguf"),
    "MLX": partial(exported, "mlx"),
    "compressed-tensors": partial(exported, "compressed-tensors"),
    "picture": picture,
    "items": items,
}


def content(folder: Path) -> dict[str, bytes]:
    """Of all files but locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["at its beginning", "in its middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_whole_or_not_there_and_comes_when_there_is_room(
    kind: str, share: float, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write, before = KINDS[kind](folder), content(folder)
    shutil.copytree(folder, tmp_path / "before")
    write()
    expected = content(folder)
    limit = int(share * max(len(there) for name, there in expected.items() if there != before.get(name)))
    shutil.rmtree(folder)
    (tmp_path / "before").rename(folder)
    with files_end_at(limit), pytest.raises(UserError, match=r"(File too large|No space left).*Make room") as told:
        write()
    assert str(folder) in str(told.value)
    left = content(folder)
    assert before.keys() <= left.keys()
    assert all(there in (expected.get(name), before.get(name)) for name, there in left.items())
    write()
    assert content(folder) == expected


def test_a_record_of_a_ledger_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with files_end_at(10), pytest.raises(UserError, match=r"ledger.jsonl.*File too large.*Make room"):
        Ledger.open(path, {})
    assert [*tmp_path.iterdir()] == []
    Ledger.open(path, {}).start(0, {"seed": 0}, 0)
    whole = path.read_bytes()
    ledger = Ledger.open(path, {})
    with files_end_at(len(whole) + 20), pytest.raises(UserError, match=r"ledger.jsonl.*make room, and go on with"):
        ledger.finish(0, {"loss": 1.0})
    assert path.read_bytes() == whole
    again = Ledger.open(path, {})
    again.finish(0, {"loss": 1.0})
    assert again.records == Ledger.open(path, {}).records and again.records[0].scores == {"loss": 1.0}


def test_the_checkpoint_before_stays_and_the_fit_goes_on_from_it(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    fitting = trainer(RunCheckpoint(path, every_n_steps=2), steps=4)
    fitting.fit(finetuner(tiny_llama), datamodule=stories)
    expected = torch.load(path, weights_only=True)["state_dict"]
    path.unlink()

    room = ExitStack()

    class Fills(Callback):
        """From the third step on there is no room."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                room.enter_context(files_end_at(path.stat().st_size // 2))

    with room:
        fitting = trainer(Fills(), RunCheckpoint(path, every_n_steps=2), steps=4)
        with pytest.raises(UserError, match=r"Cannot write '.*last.ckpt': File too large.*Make room"):
            fitting.fit(finetuner(tiny_llama), datamodule=stories)
    assert [*tmp_path.iterdir()] == [path] and torch.load(path, weights_only=True)["global_step"] == 2
    trainer(RunCheckpoint(path, every_n_steps=2), steps=4).fit(
        finetuner(tiny_llama), datamodule=stories, ckpt_path=path, weights_only=True
    )
    trained = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())


def test_a_log_without_room_ends_nothing_and_is_not_told_at_each_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = log_to(tmp_path / "run.log")
    logger = logging.getLogger("qpruner")
    with files_end_at(0):
        logger.warning("This has no room.")
        stop()
    assert "Logging error" not in capsys.readouterr().err and (tmp_path / "run.log").read_text() == ""


def test_what_others_write_in_a_run_is_told_with_its_folder(tmp_path: Path, arguments: list[str]) -> None:
    """Such as TensorBoard, whose files the run does not read to go on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", no_room)
        with pytest.raises(UserError, match=rf"Cannot write '{tmp_path / 'runs' / 'x'}': No space left.*same command"):
            run(["fit", *arguments])
    run(["fit", *arguments])
    assert RunFolder(tmp_path / "runs" / "x").finished


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
