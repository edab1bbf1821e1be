"""The folder of a run: its contents, and how far the run has progressed."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml

from qpruner.errors import UserError
from qpruner.files import MALFORMED, reading, write_json
from qpruner.folder_manifest import is_compressed
from qpruner.schema import conform, read_as

FINISHED = "finished.json"
"""File about the phases of a run, beside their folders."""

RESTORE = "Restore the file, or start the run anew with --restart."
"""What to do about a damaged file of a run."""


@dataclass(frozen=True)
class PhasesOver:
    """Contents of ``finished.json``.

    Args:
        finished: number of finished phases, not counting the last phase of the run.

    Raises:
        UserError: a number below 0.
    """

    finished: int

    def __post_init__(self) -> None:
        if self.finished < 0:
            raise UserError(f"{self.finished} phases are over; it must be 0 or more.")


class RunOver(TypedDict):
    """Contents of ``summary.json``, as far as the folder needs them."""

    finished: bool


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept.

    Args:
        name: name of the run; the same command with the same name continues it.
        dir: folder that holds the folders of all runs.
        checkpoint_every_n_steps: number of optimizer steps between two checkpoints, at least 1; a run that is killed
            loses the steps since the last one.
    """

    name: str = "default"
    dir: str = "runs"
    checkpoint_every_n_steps: int = 50

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise UserError(f"run.name is {self.name!r}; it must be the name of a folder, without '/'.")
        if self.checkpoint_every_n_steps < 1:
            raise UserError(f"run.checkpoint_every_n_steps is {self.checkpoint_every_n_steps}; it must be at least 1.")


class Part:
    """A part of a run's folder: a file or a folder, as an attribute of `RunFolder`.

    Args:
        name: name of the file or folder.
        of_phase: whether each phase of the run has a part of this kind.
    """

    def __init__(self, name: str, *, of_phase: bool = False) -> None:
        self.name = name
        self.of_phase = of_phase

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return (folder.phase_folder if self.of_phase else folder.path) / self.name


@dataclass(frozen=True)
class RunFolder:
    """The parts of ``runs/<name>/``.

    Args:
        path: path of the folder.
        phase: number, from 1, of a phase that is not the last, whose parts lie in ``phases/<number>/``; None for the
            last or only phase, whose parts lie in the folder itself.
    """

    path: Path
    phase: int | None = None

    config = Part("config.yaml")
    log = Part("run.log")
    manifest = Part("manifest.json")
    summary = Part("summary.json")
    test_summary = Part("test.json")
    validation_summary = Part("validate.json")
    predictions = Part("predictions.jsonl")
    evaluation = Part("evaluation")
    report = Part("report.md")
    loss_picture = Part("loss.png")
    ratio_picture = Part("ratio.png")
    plan_picture = Part("plan.png")
    tasks_picture = Part("tasks.png")
    allocation_picture = Part("allocation.png")
    phases = Part("phases")
    learning = Part("learning")
    """Where gates over structure and precision are learned, before the first phase."""
    learned_plan = Part("learned.json")
    """The learned plan, which the phases carry out."""
    learning_picture = Part("learning.png")
    teacher = Part("teacher")
    """The dense model's outputs on training rows, where these are recorded for all phases."""

    # Of a fit.
    tensorboard = Part("tensorboard", of_phase=True)
    checkpoints = Part("checkpoints", of_phase=True)
    plan = Part("plan.json", of_phase=True)
    base = Part("base", of_phase=True)
    """The compressed base that trials, or a fit that prunes in training, begin with."""
    model = Part("model", of_phase=True)
    sensitivities = Part("sensitivities.json", of_phase=True)
    allocation = Part("allocation.json", of_phase=True)
    bank = Part("bank", of_phase=True)
    calibrated = Part("calibrated", of_phase=True)
    """Layers that were rounded using text, until the base that they are part of is kept."""

    # Of a search.
    reference = Part("reference.safetensors")
    ledger = Part("ledger.jsonl")
    variants = Part("variants.jsonl")
    results = Part("search.json")
    pareto = Part("pareto.json")
    plans = Part("plans")
    prior = Part("prior")
    structure = Part("structure")
    """Scores of units, and the sums for compensating the units that are removed."""
    trials_picture = Part("trials.png")
    pareto_picture = Part("pareto.png")

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        return cls(Path(config.dir).expanduser() / config.name)

    @property
    def phase_folder(self) -> Path:
        """The folder that holds the parts of the phase."""
        return self.path if self.phase is None else self.phases / str(self.phase)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint from which an interrupted fit resumes."""
        return self.checkpoints / "last.ckpt"

    @property
    def finished(self) -> bool:
        return self.summary.exists() and read_as(self.summary, RunOver, remedy=RESTORE)["finished"]

    @property
    def finished_phases(self) -> int:
        """Number of finished phases, not counting the last phase of the run."""
        path = self.phases / FINISHED
        return read_as(path, PhasesOver, remedy=RESTORE).finished if path.exists() else 0

    @property
    def all_phases(self) -> list["RunFolder"]:
        """The folder as seen by each phase that has begun, the last phase last."""
        numbers = sorted(int(name) for folder in self.phases.glob("*") if (name := folder.name).isdecimal())
        return [*(RunFolder(self.path, number) for number in numbers), RunFolder(self.path)]

    @property
    def kept_base(self) -> Path | None:
        """The most recent compressed base of the run; None where there is none yet."""
        places = (place for phase in reversed(self.all_phases) for place in (phase.model, phase.base))
        return next(filter(is_compressed, places), None)

    def finished_model(self, otherwise: str = "") -> Path:
        """The folder of the compressed model that a finished run has left.

        Args:
            otherwise: what else a user may do about a run that is not finished, to follow "repeat its command".

        Raises:
            UserError: this is the folder of a search, or of a run that is unfinished or has left no compressed model.
        """
        name = repr(str(self.path))
        if self.results.exists():
            raise UserError(
                f"{name} is a search, which keeps no trained model. Recover its plan first: `qpruner fit --plan "
                f"{self.plan}`, and name that run."
            )
        if not self.finished:
            raise UserError(f"The run {name} is not over. Finish it first: repeat its command{otherwise}.")
        if not is_compressed(self.model):
            raise UserError(
                f"The run {name} keeps no model: {str(self.model)!r} holds none. Put it back, or run the fit again "
                f"with --restart; of a base whose family cannot be compressed a run keeps only the adapters."
            )
        return self.model

    @property
    def begun(self) -> bool:
        """Whether the run has compressed or trained anything."""
        return (
            self.finished
            or self.learned_plan.exists()
            or any(
                part.exists()
                for phase in (*self.all_phases, RunFolder(self.learning))
                for part in (phase.checkpoint, phase.model, phase.base, phase.ledger)
            )
        )

    def read_config(self) -> dict[str, Any]:
        """The options that the folder is bound to.

        Raises:
            UserError: the file is missing or damaged.
        """
        with reading(self.config, RESTORE, (*MALFORMED, yaml.YAMLError)):
            return conform(yaml.safe_load(self.config.read_text(encoding="utf-8")), dict[str, Any])

    def record_finished(self) -> None:
        """Records that this phase, which is not the last, is finished."""
        assert self.phase is not None
        write_json(self.phases / FINISHED, {"finished": self.phase})

    def drop_training_state(self) -> None:
        """Removes what a fit would resume from, once its result holds everything that is needed."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.checkpoint.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes every part, complete or partly written, and nothing else: the folder may hold more than runs."""
        for part in vars(RunFolder).values():
            if isinstance(part, Part):
                for path in (self.path / part.name, *self.path.glob(f".{part.name}.*tmp")):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
