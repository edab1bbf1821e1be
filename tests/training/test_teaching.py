"""Fits that learn from a dense model, held beside the student or recorded before."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from support.fits import PRUNING
from support.ranks import together
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import RunCheckpoint, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.model_folder import read_base_config
from qpruner.pretrained import load_model
from qpruner.processes import Processes
from qpruner.quantization.packed import PackedLinear
from qpruner.training import compressible, recording, teaching
from qpruner.training.distillation import DistillationConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig
from qpruner.training.recording import Recording
from qpruner.training.teacher import OnlineTeacher

HIDDEN = {"logits": 0.5, "hidden": 2.0, "cross_entropy": 0.2}


class PowerCut(Exception):
    pass


class Watch(Callback):
    """Keeps what each step logs, and cuts the power after one of them."""

    def __init__(self, cut: int | None = None) -> None:
        self.logged: list[dict[str, float]] = []
        self.cut = cut

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        if self.cut == len(self.logged):
            raise PowerCut


@pytest.fixture(scope="module")
def base(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with weights so large that its distributions are far from flat, and pruning is seen."""
    folder = tmp_path_factory.mktemp("sharp")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    model = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 15
    model.save_pretrained(folder)
    return folder


def fit(
    model: Path, folder: Path, data: StoriesDataModule, watch: Watch | None = None, ratio: float = 0.1, **options: Any
) -> LoRAFinetuner:
    config = options.pop("config", None) or DistillationConfig(**options)
    module = LoRAFinetuner(
        base=str(model),
        lora=LoRAConfig(r=2, dropout=0.3),
        optimizer=OptimizerConfig(lr=1e-2),
        distillation=config,
    )
    checkpoint = RunCheckpoint(folder / "last.ckpt", every_n_steps=2)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=8,
        log_every_n_steps=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[watch or Watch(), StructuredPruning(**PRUNING | {"ratio": ratio}), checkpoint],
    )
    trainer.fit(
        module,
        datamodule=data.for_another_trainer(),
        ckpt_path=checkpoint.path if checkpoint.path.exists() else None,
        weights_only=True,
    )
    return module


def adapters(module: LoRAFinetuner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def kept_base() -> Path:
    """The one compressed base that fits of this test have kept."""
    (folder,) = (place for place in Path(compressible.BASES).iterdir() if place.is_dir())
    return folder


def recorded(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "teacher").iterdir()}


def test_the_dense_model_teaches_and_is_part_of_nothing(base: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    watch = Watch()
    module = fit(base, tmp_path, stories, watch, **HIDDEN)
    assert isinstance(module.teacher, OnlineTeacher)
    dense = load_model(str(base), dtype="float32", trust_remote_code=False)
    taught = dict(module.teacher.network.named_parameters())
    for name, parameter in dense.named_parameters():  # as it is on disk, and not pruned as the student is
        assert torch.equal(taught[name], parameter)
        assert taught[name].grad is None and not taught[name].requires_grad
    assert module.compressed.known_plan().architecture.ffn_channels == (48, 48)
    assert module.model.get_base_model().model.layers[0].mlp.up_proj.out_features < 48
    ours = {parameter.data_ptr() for parameter in module.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in taught.values()}
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["state_dict"].keys() == adapters(module).keys()
    assert content["hyper_parameters"]["distillation"]["hidden"] == 2.0
    loaded = LoRAFinetuner.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.distillation == module.distillation and loaded.teacher is None
    evaluation = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    plain = LoRAFinetuner.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True, distillation=None)
    results = [evaluation.validate(one, datamodule=stories, verbose=False) for one in (loaded, plain)]
    assert results[0] == results[1] and plain.distillation is None and loaded.teacher is None
    assert {"train/loss", "train/kl", "train/hidden"} <= watch.logged[0].keys()
    assert watch.logged[-1]["train/kl"] < watch.logged[0]["train/kl"]


def test_what_is_logged_is_what_the_pruned_model_is_away_from_the_dense_one(
    base: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    watch = Watch(cut=1)
    with pytest.raises(PowerCut):
        fit(base, tmp_path, stories, watch, **HIDDEN)
    dense = load_model(str(base), dtype="float32", trust_remote_code=False)
    student = LoRAFinetuner(base=str(kept_base()))
    student.load_base()
    batch: Any = next(iter(stories.train_dataloader()))
    scored = batch["labels"][:, 1:] != -100
    logits, taught = (model(batch["input_ids"]).logits[:, :-1][scored] for model in (student.model, dense))
    nll = F.cross_entropy(logits, batch["labels"][:, 1:][scored])
    p, q = (torch.softmax(one / 2, -1) for one in (taught, logits))
    assert watch.logged[0]["train/loss"] == pytest.approx(float(nll), rel=1e-4)  # adapters have no effect yet
    assert watch.logged[0]["train/kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)


def test_recorded_teaches_as_online_does(base: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    watches = {}
    for name, options in {
        "online": {},
        "whole": {"teacher": "recorded", "top_k": 5000},  # of 2,048 words: all
        "few": {"teacher": "recorded", "top_k": 16},
    }.items():
        watches[name] = Watch()
        fit(base, tmp_path / name, stories, watches[name], **HIDDEN, **options)
    for online, whole, few in zip(*(watch.logged for watch in watches.values()), strict=True):
        assert whole["train/kl"] == pytest.approx(online["train/kl"], rel=2e-3)
        assert whole["train/hidden"] == pytest.approx(online["train/hidden"], rel=1e-3)
        assert whole["train/loss"] == pytest.approx(online["train/loss"], rel=1e-4)
        assert few["train/kl"] < whole["train/kl"]
    # Of a flat distribution over 2,048 words, 16 kept ones tell little.
    tensors = recorded(tmp_path / "few")
    assert len(tensors) == 1 and 0.1 < few["train/kl"] / whole["train/kl"] < 0.999


@pytest.mark.parametrize("teacher", ["online", "recorded"])
def test_a_fit_that_was_cut_off_ends_with_the_same_numbers(
    teacher: str, base: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**HIDDEN, "teacher": teacher, "top_k": 8}
    whole = adapters(fit(base, tmp_path / "whole", stories, **options))
    with pytest.raises(PowerCut):
        fit(base, tmp_path / "cut", stories, Watch(cut=5), **options)
    if teacher == "recorded":
        monkeypatch.setattr(Recording, "record", None)  # nothing is missing
    resumed = adapters(fit(base, tmp_path / "cut", stories, **options))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_pass_that_was_killed_goes_on_behind_its_last_file(
    base: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PART_BYTES", 24 * (2 * 9 + 4 * 8) * 4)  # four rows to a part, of 22
    right, written = recording.save_file, []

    def cut_off(tensors: Any, path: Path) -> None:
        if len(written) == 3:
            path.write_bytes(b"half a file")
            raise PowerCut
        written.append(path)
        right(tensors, path)

    options: dict[str, Any] = {"teacher": "recorded", "top_k": 8}
    with monkeypatch.context() as patch:
        patch.setattr(recording, "save_file", cut_off)
        with pytest.raises(PowerCut):
            fit(base, tmp_path, stories, **options)
    before = recorded(tmp_path)
    assert len(before) == 3
    killed = adapters(fit(base, tmp_path, stories, **options))
    after = recorded(tmp_path)
    assert len(after) == 6 and before.items() <= after.items()
    whole = adapters(fit(base, tmp_path / "whole", stories, **options))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())
    # A second fit uses them, whatever else of it is new; at another temperature others are needed.
    (tmp_path / "last.ckpt").unlink()
    fit(base, tmp_path, stories, **options, cross_entropy=0.7)
    assert recorded(tmp_path) == after
    fit(base, tmp_path / "hot", stories, **options, temperature=3.0)
    assert not recorded(tmp_path / "hot").keys() & after.keys()


def test_a_teacher_in_8_bits_says_nearly_the_same(base: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    watches = [Watch(), Watch()]
    for watch, dtype in zip(watches, ("auto", "int8"), strict=True):
        module = fit(base, tmp_path / dtype, stories, watch, **HIDDEN, dtype=dtype)
    assert isinstance(module.teacher, OnlineTeacher)
    assert any(isinstance(layer, PackedLinear) for layer in module.teacher.network.modules())
    for dense, packed in zip(*(watch.logged for watch in watches), strict=True):
        assert 0 < abs(packed["train/kl"] - dense["train/kl"]) < 0.05 * dense["train/kl"]


@pytest.fixture
def others(tmp_path: Path) -> dict[str, Path]:
    """Models with other widths than the tiny Llama."""
    folders = {}
    for name, changes in {"vocabulary": {"vocab_size": 2000}, "width": {"hidden_size": 64}}.items():
        sizes = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        config = LlamaConfig(**{**sizes, **changes}, num_attention_heads=4, num_key_value_heads=2)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    return folders


@pytest.mark.parametrize(
    ("which", "options", "said"),
    [
        ("vocabulary", {}, r"has 2,000 words and the student 2,048.*distillation.base the model that it was made of"),
        ("width", {"hidden": 1.0}, r"has 64 channels and the student 32.*distillation.hidden 0"),
        ("nowhere", {}, r"nowhere.* is not there. Give one as --model.distillation.base"),
        ("", {"device": "cuda:7"}, r"distillation.device is 'cuda:7', and there are \d CUDA devices"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_compressed(
    which: str, options: dict[str, Any], said: str, others: dict[str, Path], base: Path,
    stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(StructuredPruning, "compress", None)
    teacher = str(others.get(which, tmp_path / which)) if which else None
    config = DistillationConfig(base=teacher, **options)
    with pytest.raises(UserError, match=said):
        fit(base, tmp_path / "run", stories, config=config)
    with pytest.raises(UserError, match=said):  # without weights
        LoRAFinetuner(base=str(base), distillation=config).check_base()


def test_another_model_of_the_same_vocabulary_may_teach(
    others: dict[str, Path], base: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    module = fit(base, tmp_path / "run", stories, base=str(others["width"]))
    assert isinstance(module.teacher, OnlineTeacher) and module.teacher.network.config.hidden_size == 64


def test_a_full_disk_is_told_before_the_pass(
    base: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = stories.train_dataloader()
    seen = {row for epoch, batches in ((0, 5), (1, 3)) for batch in loader.batches(epoch)[:batches] for row in batch}
    needed = stories.examples("train").num_scored(sorted(seen)) * (2 * 9 + 4 * 8 + 4 * 32)
    assert len(seen) < 22
    monkeypatch.setattr(recording.shutil, "disk_usage", lambda path: type("Usage", (), {"free": needed - 1}))
    monkeypatch.setattr(Recording, "record", None)
    monkeypatch.setattr(StructuredPruning, "compress", None)
    with pytest.raises(UserError, match=rf"takes {needed:,} bytes.* has {needed - 1:,} left.*top_k \(now 8\)"):
        fit(base, tmp_path, stories, **HIDDEN, teacher="recorded", top_k=8)


def test_a_rehearsal_records_nothing(base: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    module = LoRAFinetuner(base=str(base), distillation=DistillationConfig(teacher="recorded"))
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="rehearsal .*Rehearse with --model.distillation.teacher online"):
        trainer.fit(module, datamodule=stories.for_another_trainer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("teacher", ["online", "recorded"])
def test_a_process_without_the_device_is_heard_by_the_others(
    teacher: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "processes_of", lambda trainer: trainer.processes)
    monkeypatch.setattr(teaching, "load_teacher", lambda *_, **__: torch.nn.Linear(1, 1))
    model = SimpleNamespace(config=read_base_config(str(base)))
    module: Any = SimpleNamespace(base=str(base), model=model, trust_remote_code=False, dtype_of_base="auto")

    def work(processes: Processes) -> None:
        trainer: Any = SimpleNamespace(processes=processes, fast_dev_run=False)
        config = DistillationConfig(teacher=teacher, device="cuda:7" if processes.rank else "cpu")
        teaching.engage_teacher(config, module, trainer, tmp_path)

    assert all(isinstance(error, UserError) and "'cuda:7'" in str(error) for error in together(work, work))


def test_rows_that_have_no_numbers_cannot_be_recorded(base: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    module = LoRAFinetuner(base=str(base), distillation=DistillationConfig(teacher="recorded"))
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="recorded on the rows of a data module of qpruner.*Have the teacher online"):
        trainer.fit(module, train_dataloaders=stories.train_dataloader())


def test_the_dense_model_behind_a_compressed_base_teaches(
    base: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    with pytest.raises(PowerCut):
        fit(base, tmp_path, stories, Watch(cut=1))
    module = fit(kept_base(), tmp_path / "again", stories, ratio=0.03)
    assert isinstance(module.teacher, OnlineTeacher)
    assert module.teacher.network.model.layers[0].mlp.up_proj.out_features == 48
