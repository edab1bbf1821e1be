"""How callbacks that prune compensate for what was removed."""

from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from qpruner.anatomy import decoder_layers
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks.calibration import calibration_of, text_of
from qpruner.compressed import CompressedModel
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import place_
from qpruner.plan import CompressionPlan
from qpruner.processes import Processes
from qpruner.pruning.compensation import Compensation, check_text, compensated_widths, describe, shared_copy


@dataclass(frozen=True)
class Before:
    """A model before it is pruned.

    Args:
        network: network that shares all tensors with the one that is going to be pruned.
        plan: plan of the network.
    """

    network: Any
    plan: CompressionPlan


@dataclass(frozen=True)
class Compensating:
    """The options of a compensation, and its steps in the order of a fit.

    Args:
        how: what the remaining weights compensate for; see `qpruner.pruning.compensation`.
        text: calibration text for the least squares.
    """

    how: Compensation
    text: CalibrationConfig

    @property
    def options(self) -> dict[str, Any]:
        return {"compensation": self.how, "compensation_text": asdict(self.text)}

    def check(self, model: Any) -> None:
        """Checks, before any work, that there is enough text for the widths of a model.

        Raises:
            UserError: there is too little.
        """
        if self.how != "none":
            layers = decoder_layers(model)
            widest = max(width for layer in layers for width in compensated_widths(layer))
            check_text(self.text, widest)

    def check_text(self, data: TokenDataModule) -> None:
        """Checks, before any work with the model, that there are enough data.

        Raises:
            UserError: there are too few.
        """
        if self.how != "none":
            self._draw_text(data)

    def begin(self, model: CompressedModel, data: TokenDataModule | None) -> None:
        """Makes sure that a model can be compensated once it is pruned.

        Args:
            model: model that is going to be pruned.
            data: source of the text; None if there is none.

        Raises:
            UserError: the weights are packed, or there is no text or too little of it.
        """
        if self.how != "none":
            model.check_unpacked("compensated")
            self.check(model.network)
            self._draw_text(data)

    def remember(self, model: CompressedModel) -> Before | None:
        """The model in its present state, which takes no memory until it changes; None if nothing will need it.

        Args:
            model: model that is going to be pruned.
        """
        return None if self.how == "none" else Before(shared_copy(model.network), model.known_plan())

    def apply(
        self, model: CompressedModel, before: Before | None, data: TokenDataModule | None, processes: Processes
    ) -> None:
        """Compensates a model that was pruned.

        Args:
            model: pruned model; it is moved to the device that computes.
            before: result of `remember`; None to leave the model as it is.
            data: source of the text; None if there is none.
            processes: processes that share the text.

        Raises:
            UserError: there is no room for the dense model next to the pruned one.
        """
        if self.how == "none" or before is None:
            return
        calibration = calibration_of(model.network, data, self.text, processes, self._name)
        place_(before.network, processes.device)
        fits = model.compensate(before.network, before.plan, calibration, self.how)
        rank_zero_info(describe(fits, self.text.num_sequences * self.text.length))

    @property
    def _name(self) -> str:
        return f"Compensation {self.how!r}"

    def _draw_text(self, data: TokenDataModule | None) -> None:
        try:
            text_of(data, self.text, self._name)
        except UserError as error:
            raise UserError(
                f"{error} It is the compensation that asks (compensation_text); with compensation none nothing does."
            ) from error
