"""The folder of a run: where its parts lie, who may write it, and which configuration it belongs to."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import yaml
from filelock import FileLock, Timeout

from qpruner.errors import UserError
from qpruner.files import MALFORMED, reading, write_json, write_text
from qpruner.schema import conform, read_as

FREE_OPTIONS = (
    "ckpt_path",
    "config",
    "data.init_args.cache_dir",
    "data.init_args.loader.num_workers",
    "restart",
    "run.dir",
    "run.name",
    "search.executor.address",
    "search.executor.kind",
    "search.executor.time_limit",
    "search.executor.workers",
    "search.finalist_seeds",
    "search.finalist_steps",
    "search.finalists",
    "search.optimizer",
    "search.trials",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "weights_only",
)
"""Options that change no number of a run, so that a run may be continued with others."""


FINISHED = "finished.json"
"""Of the phases of a run, beside their folders."""

RESTORE = "Restore the file, or start the run anew with --restart."
"""What to do about a file of a run that is damaged."""


@dataclass(frozen=True)
class PhasesOver:
    """What ``finished.json`` holds.

    Args:
        finished: how many phases that others follow are over.

    Raises:
        UserError: less than none.
    """

    finished: int

    def __post_init__(self) -> None:
        if self.finished < 0:
            raise UserError(f"{self.finished} phases are over; it must be 0 or more.")


class RunOver(TypedDict):
    """What ``summary.json`` holds, as far as the folder asks."""

    finished: bool


@dataclass(frozen=True)
class RunConfig:
    """Where a run is kept.

    Args:
        name: name of the run; the same command with the same name continues it.
        dir: folder that holds the folders of all runs.
        checkpoint_every_n_steps: optimizer steps between two checkpoints, at least 1; a run that is killed loses the
            steps since the last one.
    """

    name: str = "default"
    dir: str = "runs"
    checkpoint_every_n_steps: int = 50

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name:
            raise UserError(f"run.name is {self.name!r}; it must be the name of a folder, without '/'.")
        if self.checkpoint_every_n_steps < 1:
            raise UserError(f"run.checkpoint_every_n_steps is {self.checkpoint_every_n_steps}; it must be at least 1.")


@dataclass(frozen=True)
class RunFolder:
    """The parts of ``runs/<name>/``.

    Args:
        path: of the folder.
        phase: number, from 1, of a phase that others follow, whose own parts lie in ``phases/<number>/``; None for the
            last or only one, whose own parts lie in the folder itself.
    """

    path: Path
    phase: int | None = None

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        return cls(Path(config.dir).expanduser() / config.name)

    # Of the run.

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.md"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.jsonl"

    @property
    def loss_picture(self) -> Path:
        return self.path / "loss.png"

    @property
    def allocation_picture(self) -> Path:
        return self.path / "allocation.png"

    @property
    def ratio_picture(self) -> Path:
        return self.path / "ratio.png"

    @property
    def plan_picture(self) -> Path:
        return self.path / "plan.png"

    @property
    def reference(self) -> Path:
        return self.path / "reference.safetensors"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def variants(self) -> Path:
        return self.path / "variants.jsonl"

    @property
    def results(self) -> Path:
        return self.path / "search.json"

    @property
    def pareto(self) -> Path:
        return self.path / "pareto.json"

    @property
    def plans(self) -> Path:
        return self.path / "plans"

    @property
    def prior(self) -> Path:
        return self.path / "prior"

    @property
    def trials_picture(self) -> Path:
        return self.path / "trials.png"

    @property
    def pareto_picture(self) -> Path:
        return self.path / "pareto.png"

    @property
    def phases(self) -> Path:
        return self.path / "phases"

    @property
    def finished_phases(self) -> int:
        """How many phases that others follow are over."""
        path = self.phases / FINISHED
        return read_as(path, PhasesOver, remedy=RESTORE).finished if path.exists() else 0

    @property
    def finished(self) -> bool:
        return self.summary.exists() and read_as(self.summary, RunOver, remedy=RESTORE)["finished"]

    # Of one phase.

    @property
    def own(self) -> Path:
        return self.path if self.phase is None else self.phases / str(self.phase)

    @property
    def tensorboard(self) -> Path:
        return self.own / "tensorboard"

    @property
    def checkpoint(self) -> Path:
        return self.own / "checkpoints" / "last.ckpt"

    @property
    def plan(self) -> Path:
        return self.own / "plan.json"

    @property
    def base(self) -> Path:
        """The compressed base that trials, or a fit that prunes in training, begin with."""
        return self.own / "base"

    @property
    def model(self) -> Path:
        return self.own / "model"

    @property
    def sensitivities(self) -> Path:
        return self.own / "sensitivities.json"

    @property
    def allocation(self) -> Path:
        return self.own / "allocation.json"

    @property
    def bank(self) -> Path:
        return self.own / "bank"

    @property
    def all_phases(self) -> list["RunFolder"]:
        """The folder in each phase that has begun, the last one last."""
        numbers = sorted(int(name) for folder in self.phases.glob("*") if (name := folder.name).isdecimal())
        return [*(RunFolder(self.path, number) for number in numbers), RunFolder(self.path)]

    @property
    def bases(self) -> list[Path]:
        """Where a compressed base of the run may lie, the last one first."""
        return [place for phase in reversed(self.all_phases) for place in (phase.model, phase.base)]

    def record_finished(self) -> None:
        """Says that this phase, which others follow, is over."""
        assert self.phase is not None
        write_json(self.phases / FINISHED, {"finished": self.phase})

    def drop_training_state(self) -> None:
        """Removes what a fit goes on from, once its result holds all that is needed of it."""
        shutil.rmtree(self.base, ignore_errors=True)
        self.checkpoint.unlink(missing_ok=True)

    def lock(self) -> FileLock:
        """Makes the folder and keeps others out, until the lock that is returned is released or the process ends.

        Raises:
            UserError: the folder cannot be made or written, or another process works in it.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"Another process is working in {str(self.path)!r}. Wait for it, or give this run another --run.name."
            ) from None
        except OSError as error:
            raise UserError(
                f"Cannot write the run folder {str(self.path)!r} ({error}). Name another place with --run.dir."
            ) from error
        return lock

    def claim(self, config: dict[str, Any], *, restart: bool) -> bool:
        """Binds the folder to a configuration, and says whether there is a run to continue.

        As long as a run has neither compressed nor trained anything its options may still change; it then begins anew.

        Args:
            config: all options of the command.
            restart: whether to throw away what is there.

        Raises:
            UserError: the folder belongs to a run with other options; each is named.
        """
        # One that is thrown away need not be readable.
        stored = self.read_config() if self.config.exists() and not restart else {}
        changes = changed_options(stored, config)
        if restart or not stored or (changes and not self._begun):
            self._clear()
            write_text(self.config, yaml.safe_dump(config, sort_keys=False))
            return False
        if changes:
            listed = "\n".join(f"  {name}: was {was}, is now {now}" for name, (was, now) in changes.items())
            raise UserError(
                f"{str(self.path)!r} holds a run with other options:\n{listed}\nContinue it with its own options, "
                f"start it anew with --restart, or give this run another --run.name."
            )
        return True

    def read_config(self) -> dict[str, Any]:
        """The options that the folder is bound to.

        Raises:
            UserError: the file is gone or damaged.
        """
        with reading(self.config, RESTORE, (*MALFORMED, yaml.YAMLError)):
            return conform(yaml.safe_load(self.config.read_text(encoding="utf-8")), dict[str, Any])

    @property
    def _begun(self) -> bool:
        """Whether the run has compressed or trained anything."""
        return self.finished or any(
            part.exists()
            for phase in self.all_phases
            for part in (phase.checkpoint, phase.model, phase.base, phase.ledger)
        )

    def _clear(self) -> None:
        """Removes what a run left here, and nothing else: the folder may hold more than runs."""
        folders = (self.tensorboard, self.checkpoint.parent, self.model, self.bank, self.base, self.prior, self.plans)
        for folder in (*folders, self.phases):
            shutil.rmtree(folder, ignore_errors=True)
        files = [
            *(self.config, self.manifest, self.summary, self.report, self.plan, self.sensitivities, self.allocation),
            *(self.reference, self.ledger, self.variants, self.results, self.pareto),
            *(
                self.loss_picture,
                self.ratio_picture,
                self.plan_picture,
                self.allocation_picture,
                self.trials_picture,
                self.pareto_picture,
            ),
        ]
        for file in files:
            file.unlink(missing_ok=True)


def changed_options(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options, as dotted names, whose values differ and matter, each with its stored and its given value."""
    before, after = _flat(stored), _flat(given)
    names = sorted(before.keys() | after.keys())
    return {
        name: (before.get(name), after.get(name))
        for name in names
        if name not in FREE_OPTIONS and before.get(name) != after.get(name)
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value))  # callbacks: each option by its own name
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat
