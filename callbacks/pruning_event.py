"""What is reported about a pruning event during training, in the log and on TensorBoard."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from qpruner.pruning.gradual import GradualPruning
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import Kept


@dataclass(frozen=True)
class PruningEvent:
    """One pruning event.

    Args:
        step: number of optimizer steps taken so far.
        gradual: how the fit prunes.
        kept: [layers], indices of the KV groups and FFN channels that are alive after the event.
        scores: [layers], scores of all units, by which the kept ones were chosen.
        agreement: share of the units removed at this event that the scores of the previous event would have removed,
            too.
        skipped: number of steps so far whose gradients were not finite.
    """

    step: int
    gradual: GradualPruning
    kept: Kept
    scores: list[LayerScores]
    agreement: float | None
    skipped: int

    @property
    def shares(self) -> tuple[float, float]:
        """Share of all parameters that has been removed, and share of those of the decoder linears."""
        removed = self.gradual.removed(self.kept)
        return removed / self.gradual.total, removed / self.gradual.in_linears

    @property
    def line(self) -> str:
        of_all, of_linears = self.shares
        groups, channels = (sorted(len(layer[kind]) for layer in self.kept) for kind in (0, 1))
        same = "" if self.agreement is None else f", {self.agreement:.0%} of what went as the scores before had it"
        skipped = f", {self.skipped} steps skipped for gradients that were not finite" if self.skipped else ""
        return (
            f"Step {self.step}: {of_all:.2%} of all parameters are masked, {of_linears:.2%} of the decoder linears; "
            f"layers keep {groups[0]}-{groups[-1]} KV groups and {channels[0]}-{channels[-1]} FFN channels"
            f"{same}{skipped}."
        )

    @rank_zero_only
    def log(self, loggers: Iterable[Logger]) -> None:
        """Logs the overall shares and those of each layer, and on TensorBoard histograms of the alive units' scores."""
        of_all, of_linears = self.shares
        values = {
            "pruning/ratio": of_all,
            "pruning/ratio_of_linears": of_linears,
            "pruning/skipped_steps": float(self.skipped),
        }
        if self.agreement is not None:
            values["pruning/agreement"] = self.agreement
        for number, (supply, (groups, channels)) in enumerate(zip(self.gradual.dense, self.kept, strict=True)):
            values[f"pruning/kept_kv_groups/layer_{number:02}"] = len(groups) / supply.kv_groups
            values[f"pruning/kept_ffn_channels/layer_{number:02}"] = len(channels) / supply.ffn_channels
        for logger in loggers:
            logger.log_metrics(values, step=self.step)
            if isinstance(logger, TensorBoardLogger):
                for number, (score, (groups, channels)) in enumerate(zip(self.scores, self.kept, strict=True)):
                    for kind, of_kind in (
                        ("kv_groups", score.kv_groups[groups]),
                        ("ffn_channels", score.ffn_channels[channels]),
                    ):
                        tag = f"pruning/log10_scores_{kind}/layer_{number:02}"
                        logger.experiment.add_histogram(tag, _log10(of_kind), self.step)


def _log10(scores: Tensor) -> Tensor:
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).log10()
