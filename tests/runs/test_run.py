"""A run from Python: what the command line does, in a few lines of a notebook."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from safetensors.torch import load_file

from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.budget import Budget
from qpruner.callbacks import LoRAGuidedPruning, MixedPrecisionQuantization, StructuredPruning
from qpruner.commands import run as run_command
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.model_folder import load_compressed, read_plan
from qpruner.plan import CompressionPlan
from qpruner.records.report import Summary
from qpruner.runs import PhaseConfig, Run
from qpruner.search.config import SearchConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

TRAINER = {"accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1, "enable_progress_bar": False}
QUIET = {"enable_model_summary": False}


class PowerCut(Exception):
    pass


class CutAt(Callback):
    """Ends the fit at an optimizer step, as a power cut would; what was written stays."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise PowerCut


class Counter(Callback):
    """Counts what it sees: batches of training, and fits."""

    def __init__(self) -> None:
        self.batches = 0
        self.fits = 0

    def on_fit_start(self, *_: Any) -> None:
        self.fits += 1

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


@pytest.fixture
def given(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a run of four steps, and where it lies."""
    return {
        "folder": tmp_path / "x",
        "model": LoRAFinetuner(base=str(tiny_llama), lora=LoRAConfig(r=2), optimizer=OptimizerConfig(lr=0.01)),
        "data": stories(tiny_llama),
        "trainer": TRAINER | QUIET,
        "checkpoint_every_n_steps": 1,
    }


def stories(base: Path, **options: Any) -> StoriesDataModule:
    return StoriesDataModule(
        tokenizer=str(base), max_length=24, num_train=22, num_validation=6, num_test=6, num_choices=4,
        loader=LoaderConfig(batch_size=4), **options,
    )  # fmt: skip


def anew(given: dict[str, Any], **changes: Any) -> Run:
    """A run as a new process would make it: a module that has seen nothing."""
    return Run(**{**given, "model": LoRAFinetuner(**given["model"].hparams), **changes})


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_fit_is_measured_kept_and_not_repeated(given: dict[str, Any]) -> None:
    counter = Counter()
    run = Run(**given, callbacks=[StructuredPruning(0.05, criterion="magnitude_l1", compensation="none"), counter])
    run.fit()
    assert [stage.name for stage in run.summary.stages] == ["dense", "pruned", "recovered"]
    assert run.summary.finished and (counter.fits, counter.batches) == (1, 4)
    run.fit()
    assert counter.fits == 1
    # The adapters that were trained are those of the folder, and of the module that was given.
    trained = {name: tensor for name, tensor in given["model"].named_parameters() if tensor.requires_grad}
    kept = adapters(run.folder.model)
    assert len(kept) == len(trained) and sorted(map(torch.norm, kept.values())) == sorted(
        map(torch.norm, trained.values())
    )
    assert load_compressed(run.folder.model)(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_a_fit_without_compression_keeps_its_model(given: dict[str, Any]) -> None:
    run = Run(**given)
    run.fit()
    run.folder.checkpoint.unlink()  # the model is enough
    dense, recovered = run.evaluate("test").stages
    assert [dense.results, recovered.results] == [
        pytest.approx(stage.results, rel=1e-6) for stage in run.summary.stages
    ]
    assert recovered.results["perplexity"] < dense.results["perplexity"]


def test_evaluation_measures_every_stage_and_leaves_the_fit_alone(given: dict[str, Any]) -> None:
    run = Run(**given, callbacks=[MixedPrecisionQuantization(bits=4)])
    (dense,) = run.evaluate("test").stages
    run.fit()
    fitted = {stage.name: stage for stage in run.summary.stages}
    assert dense.results == pytest.approx(fitted["dense"].results, rel=1e-6)
    before = run.summary
    tested, validated = run.evaluate("test"), run.evaluate("validation")
    assert [stage.name for stage in tested.stages] == ["dense", "quantized", "recovered"]
    assert run.model.model is None  # one model in memory is enough
    for stage in tested.stages:
        assert stage.results == pytest.approx(fitted[stage.name].results, rel=1e-6)
    assert Summary.read(run.folder.test_summary) == tested
    assert Summary.read(run.folder.validation_summary) == validated != tested
    run.predict()
    assert len(run.folder.predictions.read_text().splitlines()) == 6 + 4
    assert run.summary == before


def test_what_was_measured_of_a_fit_that_was_cut_off_does_not_outlive_it(given: dict[str, Any]) -> None:
    options = Run(**given).bound_options()
    cut = anew(given, callbacks=[CutAt(2)], options=options)
    with pytest.raises(PowerCut):
        cut.fit()
    assert not cut.evaluate("test").finished and not Summary.read(cut.folder.test_summary).finished
    cut.evaluate("validation")
    cut.predict()
    whole = anew(given, options=options)
    whole.fit()
    stale = (whole.folder.test_summary, whole.folder.validation_summary, whole.folder.predictions)
    assert not any(file.exists() for file in stale)
    assert whole.evaluate("test").finished
    whole.fit()  # nothing is left to do, and so what was measured stays
    assert whole.folder.test_summary.exists()


def test_callbacks_and_loggers_that_a_fit_changes_are_bound_as_they_were_given(given: dict[str, Any]) -> None:
    def run() -> Run:
        logger = TensorBoardLogger(given["folder"].with_name("logs"))
        return anew(given, callbacks=[ModelCheckpoint()], trainer={**given["trainer"], "logger": logger})

    first = run()
    first.fit()
    first.fit()
    again = run()  # whose logger would count on
    again.fit()
    assert len(read_json(again.folder.manifest)["sessions"]) == 1


def test_binding_reads_no_property_of_a_logger_and_sees_callbacks_that_come_later(given: dict[str, Any]) -> None:
    class Remote(CSVLogger):
        def __init__(self, save_dir: Path, run_id: str | None = None) -> None:
            super().__init__(save_dir)

        @property
        def run_id(self) -> str:
            pytest.fail("a remote run was started")

    logger = Remote(given["folder"].with_name("logs"))
    run = anew(given, trainer={**given["trainer"], "logger": logger})
    run.callbacks.append(StructuredPruning(0.2))
    (callback,) = run.bound_options()["trainer"]["callbacks"]
    assert callback["class_path"].endswith("StructuredPruning") and callback["init_args"]["ratio"] == 0.2


def test_data_of_other_kinds_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="are a LightningDataModule, and must be a TokenDataModule"):
        Run(given["folder"], given["model"], LightningDataModule())


def test_another_checkpoint_is_measured_without_being_recorded(given: dict[str, Any], tmp_path: Path) -> None:
    given["checkpoint_every_n_steps"] = 2
    cut = anew(given, callbacks=[CutAt(3)], options=Run(**given).bound_options())
    with pytest.raises(PowerCut):
        cut.fit()
    shutil.copy(cut.folder.checkpoint, tmp_path / "early.ckpt")
    whole = anew(given, options=cut.options)
    whole.fit()
    of_run = whole.evaluate("test")
    other = whole.evaluate("test", str(tmp_path / "early.ckpt"))
    assert other.finished and other.stages[-1].results != of_run.stages[-1].results
    assert Summary.read(whole.folder.test_summary) == of_run


def test_cut_off_in_each_phase_and_run_again_equals_uninterrupted(given: dict[str, Any]) -> None:
    phased = given | {"phases": [PhaseConfig(max_steps=3, callbacks=[MixedPrecisionQuantization(bits=[8, 4])])]}

    def callbacks(*more: Callback) -> list[Callback]:
        schedule = LoRAGuidedPruning(0.05).schedule
        return [LoRAGuidedPruning(0.05, schedule=type(schedule)(warmup=0.0, cooldown=0.2, every_n_steps=2)), *more]

    whole = anew(phased, folder=given["folder"].with_name("whole"), callbacks=callbacks())
    whole.fit()
    names = [stage.name for stage in whole.summary.stages]
    assert names[0] == "dense" and names[-1] == "recovered (phase 2)"
    options = whole.bound_options()  # what cuts is none of them
    for cut in (CutAt(3), CutAt(2)):  # in the first phase, then, since that is over by then, in the second
        last = anew(phased, callbacks=callbacks(cut), options=options)
        with pytest.raises(PowerCut):
            last.fit()
        names = [stage.name for stage in last.evaluate("test").stages]
        assert (names[0], names[-1]) == ("dense", "recovered")  # by the checkpoint of the phase that it came to
    assert last.folder.finished_phases == 1
    cut.step = 99
    last.fit()  # the same object goes on, too
    assert same(adapters(last.folder.model), adapters(whole.folder.model))
    assert read_plan(last.folder.model) == read_plan(whole.folder.model)
    assert [stage.results for stage in last.summary.stages] == [stage.results for stage in whole.summary.stages]
    assert len(read_json(last.folder.manifest)["sessions"]) == 4


def test_a_plan_is_carried_out(given: dict[str, Any], tmp_path: Path) -> None:
    first = anew(
        given,
        callbacks=[
            StructuredPruning(0.05, criterion="magnitude_l1", compensation="none"),
            MixedPrecisionQuantization(bits=8),
        ],
    )
    first.fit()
    second = anew(
        given, folder=tmp_path / "y", callbacks=[StructuredPruning(0.3, compensation="none")], plan=first.folder.plan
    )
    second.fit()
    assert read_plan(second.folder.model) == CompressionPlan.read(first.folder.plan)
    assert "replaces StructuredPruning(ratio=0.3" in second.folder.log.read_text()
    with pytest.raises(UserError, match="Leave --phases out"):
        anew(given, plan=first.folder.plan, phases=[PhaseConfig(max_steps=1)]).fit()


def test_restart_begins_anew_and_clears_what_was_measured(given: dict[str, Any]) -> None:
    run = anew(given)
    run.fit()
    run.evaluate("test")
    (run.folder.path / "thesis.txt").write_text("years of work")
    other = LoRAFinetuner(**{**given["model"].hparams, "seed": 5})
    changed = anew(given, model=other)
    with pytest.raises(UserError, match="model.seed: was 0, is now 5"):
        changed.fit()
    changed.fit(restart=True)
    assert not run.folder.test_summary.exists() and changed.summary.finished
    assert (run.folder.path / "thesis.txt").read_text() == "years of work"
    assert "other options" not in run.folder.log.read_text()
    with pytest.raises(UserError, match="lies in the folder of this run"):
        anew(given, model=LoRAFinetuner(base=str(run.folder.model))).fit(restart=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"checkpoint_every_n_steps": 2}, "run.checkpoint_every_n_steps: was 1, is now 2"),
        ({"trainer": TRAINER | QUIET | {"max_steps": 5}}, "trainer.max_steps: was 4, is now 5"),
        ({"callbacks": [StructuredPruning(0.06)]}, "trainer.callbacks.0.init_args.ratio: was 0.05, is now 0.06"),
        ({"phases": [PhaseConfig(max_steps=7)]}, r"phases.0.max_steps: was None, is now 7"),
        ({"data": {"seed": 3}}, "data.init_args.seed: was 0, is now 3"),
        ({"data": {"story_seed": 3}}, "data.init_args.rows.sample.sha256: was [0-9a-f]{64}, is now [0-9a-f]{64}\n"),
    ],
)  # fmt: skip
def test_other_options_are_refused_by_name(
    given: dict[str, Any], tiny_llama: Path, changes: dict[str, Any], said: str
) -> None:
    bound = anew(given, callbacks=[StructuredPruning(0.05)])
    bound.folder.checkpoints.mkdir(parents=True)
    bound.folder.config.write_text(yaml.safe_dump(bound.bound_options()))
    bound.folder.checkpoint.touch()
    if "data" in changes:
        changes = {"data": stories(tiny_llama, **changes["data"])}
    with pytest.raises(UserError, match=said):
        anew(given, **{"callbacks": [StructuredPruning(0.05)], **changes}).fit()


def test_what_changes_no_number_may_change(given: dict[str, Any]) -> None:
    anew(given).fit()
    quiet = anew(given, trainer={**given["trainer"], "enable_progress_bar": True})
    quiet.fit()
    assert len(read_json(quiet.folder.manifest)["sessions"]) == 1


def test_a_rehearsal_leaves_nothing(given: dict[str, Any]) -> None:
    counter = Counter()
    trainer = {**given["trainer"], "fast_dev_run": True}
    Run(**{**given, "trainer": trainer}, callbacks=[MixedPrecisionQuantization(bits=8), counter]).fit()
    assert counter.batches == 1 and not given["folder"].exists()
    # The same module and callbacks then carry out the run.
    run = Run(**given, callbacks=[MixedPrecisionQuantization(bits=8), counter])
    run.fit()
    assert counter.batches == 5 and read_plan(run.folder.model).quantized


def test_objects_of_the_trainer_are_made_for_each_phase(given: dict[str, Any]) -> None:
    made = []

    def options() -> dict[str, Any]:
        made.append({**given["trainer"], "max_steps": 1})
        return made[-1]

    first = [StructuredPruning(0.05, criterion="magnitude_l1", compensation="none")]
    run = anew(given, trainer=options, callbacks=first, phases=[PhaseConfig(max_steps=2)])
    run.fit()
    assert len(made) >= 2 and [stage.name for stage in run.summary.stages][-1] == "recovered (phase 2)"
    with pytest.raises(UserError, match="Give them as its callbacks"):
        anew(given, trainer={"callbacks": [Counter()]}).fit()


def test_options_that_cannot_be_had_leave_the_folder_alone(given: dict[str, Any]) -> None:
    for changes, said in (
        ({"trainer": {"accelerator": "abacus"}}, "abacus"),
        ({"callbacks": [StructuredPruning(0.97)]}, "0.97"),
        ({"checkpoint_every_n_steps": 0}, "every 0 steps; it must be at least 1"),
        ({"callbacks": [EarlyStopping(monitor="val/losss")]}, "nothing logs"),
    ):
        with pytest.raises(UserError, match=said):
            anew(given, **changes).fit()
    assert not (given["folder"] / "model").exists()


def test_a_search_refuses_what_it_has_no_use_for(given: dict[str, Any], tmp_path: Path) -> None:
    for changes, said in (
        ({"plan": "plan.json"}, "A search makes plans"),
        ({"callbacks": [LoRAGuidedPruning(0.05)]}, "prunes before its trials"),
        ({"phases": [PhaseConfig(max_steps=1)]}, "A search has no phases"),
    ):
        with pytest.raises(UserError, match=said):
            anew(given, **changes).search(SearchConfig(trials=1))
    assert not given["folder"].exists()
    budgeted = MixedPrecisionQuantization(budget=Budget(average_bits=8))
    rehearsal = anew(given, callbacks=[budgeted], trainer={**given["trainer"], "fast_dev_run": True})
    rehearsal.folder.path.mkdir()
    rehearsal.folder.config.write_text("model: {}")
    with pytest.raises(UserError, match="a search has no rehearsal"):
        rehearsal.search(SearchConfig(trials=1), restart=True)
    assert rehearsal.folder.config.read_text() == "model: {}"


def test_the_report_of_a_run_from_python_is_that_of_the_command_line(given: dict[str, Any]) -> None:
    run = anew(given)
    run.fit()
    text = run.folder.report.read_text()
    run.folder.report.unlink()
    run_command(["report", str(run.folder.path)])
    assert run.folder.report.read_text() == text


SCRIPT = """
import sys
from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.runs import PhaseConfig, Run
from qpruner.training.module import LoRAFinetuner

base, folder = sys.argv[1:]
run = Run(
    folder,
    LoRAFinetuner(base=base, lora=LoRAConfig(r=2)),
    StoriesDataModule(tokenizer=base, max_length=24, num_train=40, num_validation=6, num_test=7, num_choices=0),
    callbacks=[StructuredPruning(0.05, criterion="magnitude_l1", compensation="none")],
    trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_steps": 2, "enable_progress_bar": False},
    phases=[PhaseConfig(max_steps=1)],
)
run.fit()
"""


@pytest.mark.slow
def test_a_script_on_two_ranks_makes_one_run(tiny_llama: Path, tmp_path: Path) -> None:
    """Lightning starts the script once more, for the second rank, which must claim nothing."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script, tiny_llama, tmp_path / "x"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = Summary.read(tmp_path / "x" / "summary.json")
    assert summary.finished and {stage.results["tokens"] for stage in summary.stages} == {7 * 23}
    assert [stage.name for stage in summary.stages] == ["dense", "pruned", "recovered", "recovered (phase 2)"]
    sessions = read_json(tmp_path / "x" / "manifest.json")["sessions"]
    assert [(one["phase"], one["devices"]) for one in sessions] == [(1, "2 x cpu"), (2, "2 x cpu")]
