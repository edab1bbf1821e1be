"""Runs the optimizers that propose: ours in this process, all of Nevergrad's in a process of their own.

Nevergrad's optimizers were written by many people. Some fail only after many scores, never answer, leave threads behind
that keep a process alive, print, or draw from the global random state. In a process of its own, started with seeds of
its own, an optimizer cannot affect the search by any of that: a missing answer becomes an error after some time, the
process is killed in the end whatever it does, and the proposals are reproducible.
"""

import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Protocol

import numpy as np

from qpruner.errors import UserError
from qpruner.search.optimizers import OURS, OptimizerSettings, make_optimizer

START_SECONDS = 180.0  # for a process to import what it needs, even from a slow disk
ANSWER_SECONDS = 300.0  # for a proposal; trials take minutes
COMMAND = "import sys; from qpruner.search.proposals import serve; serve(int(sys.argv[1]))"

Point = list[float]
Score = float | list[float]
"""Score that an optimizer is told, lower is better: one number, or one for each objective."""


logger = logging.getLogger(__name__)


class OptimizerFailed(UserError):
    """An optimizer raised an error, died, did not answer, or proposed something that is not a point."""


@dataclass(frozen=True)
class Proposal:
    """A point that an optimizer asks to have evaluated.

    Args:
        value: coordinates of the point, as plain data.
        number: number of the proposal among those of this optimizer, from 0.
    """

    value: Point
    number: int


class Proposals(Protocol):
    """An optimizer as seen by the loop.

    Raises:
        OptimizerFailed: from any method.
    """

    def wait(self) -> None:
        """Returns once the optimizer has been made; the other methods wait for that, too."""
        ...

    def ask(self) -> Proposal: ...

    def tell(self, proposal: Proposal, score: Score) -> None: ...

    def learn(self, value: Point, score: Score) -> None:
        """Tells it of a point that it did not propose; an optimizer that cannot be told starts without such points."""
        ...


@contextmanager
def open_proposals(
    settings: OptimizerSettings, *, patience: float = ANSWER_SECONDS, hear: Callable[[str], None] = logger.warning
) -> Iterator[Proposals]:
    """A fresh optimizer; its process, if it has one, starts at once and ends with the context.

    Args:
        settings: settings of the optimizer.
        patience: seconds after which an optimizer of Nevergrad that does not answer is considered failed.
        hear: called with each warning of an optimizer of Nevergrad, once for each place in the code that warns.
    """
    if settings.name in OURS:
        yield LocalProposals(settings)
        return
    with tempfile.TemporaryFile() as complaints:
        process = ProposingProcess(settings, patience, hear, complaints)
        try:
            yield process
        finally:
            process.close()


class LocalProposals:
    """An optimizer that runs in this process.

    Args:
        settings: settings of the optimizer.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.learns = True
        self._optimizer = make_optimizer(settings)
        self._out: dict[int, Any] = {}
        self._asked = 0

    def wait(self) -> None:
        pass

    def ask(self) -> Proposal:
        candidate = self._optimizer.ask()
        value = np.asarray(candidate.value, dtype=np.float64)
        if not np.isfinite(value).all():
            raise OptimizerFailed(f"{self.settings.name} proposes {value.tolist()}, which is no point.")
        proposal = Proposal(value.tolist(), self._asked)
        self._out[proposal.number] = candidate
        self._asked += 1
        return proposal

    def tell(self, proposal: Proposal, score: Score) -> None:
        self._optimizer.tell(self._out.pop(proposal.number), score)

    def learn(self, value: Point, score: Score) -> None:
        if not self.learns:
            return
        try:
            self._optimizer.tell(self._optimizer.parametrization.spawn_child(new_value=np.array(value)), score)
        except Exception as error:  # optimizers that cannot be told say so in different ways, or just crash
            warnings.warn(
                f"cannot be told of plans that others proposed, and begins without them "
                f"({type(error).__name__}: {_first_line(error)})",
                stacklevel=1,
            )
            self.learns = False
            self._optimizer = make_optimizer(self.settings)  # as if nothing had been told


class ProposingProcess:
    """An optimizer in a process of its own, whose output is discarded and which computes with one thread.

    Args:
        settings: settings of the optimizer.
        patience: seconds after which an optimizer that does not answer is considered failed.
        hear: called with each warning, once for each place in the code that warns.
        complaints: file that receives the standard error of the process, which may explain why it ended.
    """

    def __init__(
        self, settings: OptimizerSettings, patience: float, hear: Callable[[str], None], complaints: IO[bytes]
    ) -> None:
        self.name = settings.name
        self.patience = patience
        self.hear = hear
        self._heard: set[str] = set()
        self._complaints = complaints
        self._connection, theirs = Pipe()
        # Not forked, because a copy of a process with threads may deadlock; not by multiprocessing, which would import
        # the user's script a second time.
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        places = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "PYTHONHASHSEED": "0"}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._complaints,
                start_new_session=True,  # ^C is meant for the process that searches, which ends this one
                env=os.environ | limits | places,
            )
        self._send(settings)
        self._ready = False

    def wait(self) -> None:
        if not self._ready:
            self._receive("is made", START_SECONDS)
            self._ready = True

    def ask(self) -> Proposal:
        return self._call("is asked", "ask")

    def tell(self, proposal: Proposal, score: Score) -> None:
        self._call("is told a score", "tell", proposal, score)

    def learn(self, value: Point, score: Score) -> None:
        self._call("is told of an earlier trial", "learn", value, score)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _call(self, moment: str, method: str, *arguments: Any) -> Any:
        self.wait()
        self._send((method, *arguments))
        return self._receive(moment, self.patience)

    def _send(self, message: Any) -> None:
        with suppress(OSError):  # it has just died, which `_receive` will find out
            self._connection.send(message)

    def _receive(self, moment: str, patience: float) -> Any:
        try:
            if not self._connection.poll(patience):
                raise OptimizerFailed(f"{self.name} gives no answer in {patience:g} s when it {moment}.")
            answer, error, warned = self._connection.recv()
        except (EOFError, OSError):
            raise OptimizerFailed(f"{self.name} ended its process when it {moment}{self._last_words()}.") from None
        for place in warned.keys() - self._heard:
            self.hear(f"{self.name}: {warned[place]}")
        self._heard |= warned.keys()
        if isinstance(error, OptimizerFailed):
            raise error
        if error is not None:
            raise OptimizerFailed(f"{self.name} fails when it {moment}: {error}.")
        return answer

    def _last_words(self) -> str:
        status = self._process.wait()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return f", with status {status}" + (f": {lines[-1]}" if lines else "")


# What runs inside the process of an optimizer.


def serve(descriptor: int) -> None:
    """Makes an optimizer and passes on what it is asked and told, until the other end has gone.

    Args:
        descriptor: file descriptor of the connection.
    """
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    heard: dict[str, str] = {}

    def hear(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
        heard.setdefault(f"{category.__name__} {filename}:{lineno}", _first_line(message))

    warnings.simplefilter("always")
    warnings.showwarning = hear
    connection = Connection(descriptor)
    with suppress(EOFError, OSError):
        settings = connection.recv()
        random.seed(settings.seed)
        np.random.seed(settings.seed % 2**32)  # some optimizers draw from the global random state
        proposals, error = _attempt(LocalProposals, settings)
        connection.send((None, error, heard))
        while True:
            method, *arguments = connection.recv()
            answer, error = _attempt(getattr(proposals, method), *arguments)
            connection.send((answer, error, heard))
    os._exit(0)  # whatever threads the optimizer has left behind


def _attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, OptimizerFailed | str | None]:
    """The return value of a function, and its error, if any, in a form that can be sent."""
    try:
        return function(*arguments), None
    except OptimizerFailed as error:
        return None, error
    except Exception as error:  # any error of third-party code
        traceback.print_exc()
        return None, _explained(error)


def _explained(error: BaseException) -> str:
    """The error in one line; if a package is missing, the line names it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            return f"it needs the package {cause.name!r}, which is not installed"
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ").rstrip(".")


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0]


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
