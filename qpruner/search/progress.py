"""Progress of a search: a line in the log for each trial, and curves in TensorBoard."""

import time
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from qpruner.records.report import scalars
from qpruner.search.aim import Aim
from qpruner.search.ledger import Ledger, Scores, TrialRecord


class Progress:
    """Reports on the trials of a ledger, from now on.

    Args:
        ledger: trials so far; later ones are added to it before they are reported.
        aim: objective that the search minimizes.
        trials: number of trials of the whole search.
        logger: logger of the Trainer; any other than TensorBoard's receives nothing.
        curves: folder of TensorBoard's files.
        searches_widths: whether trials differ in their widths, and so in their multiply-adds.

    Attributes:
        already: number of trials that were done before.
        since: clock reading from which the duration of the other trials is measured.
    """

    def __init__(
        self, ledger: Ledger, aim: Aim, trials: int, logger: Logger | None, curves: Path, *, searches_widths: bool
    ) -> None:
        self._ledger, self._aim, self._trials = ledger, aim, trials
        self._logger, self._curves = logger, curves
        self._searches_widths = searches_widths
        self.already = sum(record.done for record in ledger.records)
        self.since = time.perf_counter()

    def report(self, record: TrialRecord) -> None:
        """Logs the outcome of a trial, and how long the remaining ones may take."""
        done = [trial for trial in self._ledger.records if trial.done]
        left = self._trials - len(done)
        rate = (time.perf_counter() - self.since) / (len(done) - self.already)
        if record.scores is None:
            outcome = f"failed: {record.why}"
        else:
            outcome = f"{self._describe(record.scores)}, {record.scores['bytes']:,} bytes"
        if record.repeats is not None:
            outcome = f"the plan of trial {record.repeats + 1} again, {outcome}"
        scored = [(self._aim.of_scores(trial.scores), trial) for trial in done if trial.scores is not None]
        _, best = min(scored, key=lambda pair: pair[0], default=(0.0, None))
        best_line = ""
        if best is not None and best.scores is not None:
            best_line = f"; best so far trial {best.number + 1}, {self._describe(best.scores)}"
        rank_zero_info(
            f"Trial {record.number + 1} of {self._trials}: {outcome}{best_line}; "
            f"{left} left, about {left * rate / 60:.1f} min."
        )
        self.show(record)

    def show(self, record: TrialRecord) -> None:
        """Shows the result of a trial in TensorBoard, if there is one, and the best result of the trials up to it."""
        if not isinstance(self._logger, TensorBoardLogger) or record.scores is None:
            return
        board = self._logger.experiment
        scored = [trial.scores for trial in self._ledger.records[: record.number + 1]]
        board.add_scalar("search/loss", record.scores["loss"], record.number)
        best = min(self._aim.of_scores(scores) for scores in scored if scores is not None)
        board.add_scalar("search/best", best, record.number)
        if (accuracy := self._aim.accuracy(record.scores)) is not None:
            board.add_scalar("search/accuracy", accuracy, record.number)
        board.add_scalar("search/bytes", record.scores["bytes"], record.number)
        if self._searches_widths:
            board.add_scalar("search/multiply_adds", record.scores["multiply_adds"], record.number)
        board.flush()

    def show_missing(self) -> None:
        """Shows trials that had only reached the ledger when an earlier session was killed."""
        shown = {number for number, _ in scalars(self._curves, "search/loss")} if self.already else set()
        for record in self._ledger.records:
            if record.done and record.number not in shown:
                self.show(record)

    def _describe(self, scores: Scores) -> str:
        """What a plan is judged by, in readable form."""
        accuracy = self._aim.accuracy(scores)
        return ("" if accuracy is None else f"accuracy {accuracy:.1%}, ") + f"loss {scores['loss']:.4f}"
