"""Trains scales and minima of the quantized base, before adapters recover what quality they can."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from qpruner.callbacks.compression import CompressionInTraining, Rehearsal
from qpruner.compressed import NO_GRIDS
from qpruner.errors import UserError
from qpruner.plan import DENSE
from qpruner.quantization.formats import GridFormat, format_for
from qpruner.training.holding import expect_holder
from qpruner.training.sharding import is_sharded


class GridPolishing(CompressionInTraining):
    """Makes a fit train the scales and minima of the packed linears instead of the adapters; the codes stay fixed.

    This makes the model neither larger nor slower. The adapters keep their initial values but still take effect: with
    ``loftq_iterations: 0`` they are zero, and a further phase trains them. Loss, learning rate and length are those of
    the fit; a rate of 1e-3 moves the outermost values of a group by about a thousandth of their distance per step.
    Linears in formats without a grid, the embedding and the head stay as they are. It comes after
    `MixedPrecisionQuantization`, or is used alone if the base is already quantized.

    ```yaml
    trainer:
      callbacks:
        - class_path: MixedPrecisionQuantization
          init_args: {bits: 2, group: 32, loftq_iterations: 0, calibrated: {}}
        - class_path: GridPolishing
    ```

    With ``model.distillation: {logits: 0, hidden: 1, cross_entropy: 1}`` the loss is the error of the last hidden state
    in addition to that of the labels. See `qpruner.quantization.polishing` for what is trained.

    setup
        Makes sure that there are scales and minima to train, and asks the module to train them.
    on_fit_end
        Rounds them to what their formats can store, so that they become part of the base, which is then saved anew.
    on_exception
        Discards what was trained, so that the module can be fitted again.

    Raises:
        UserError: no linear of the base is in a number format that has a grid.
    """

    leaves = "polished"

    @property
    def options(self) -> dict[str, Any]:
        return {}

    def check(self, rehearsal: Rehearsal) -> None:
        formats = [format_for(precision) for precision in rehearsal.precisions - {DENSE}]
        if formats and not any(isinstance(number_format, GridFormat) for number_format in formats):
            names = ", ".join(sorted({number_format.name for number_format in formats}))
            raise UserError(f"GridPolishing stands behind a quantization to {names}, which leaves {NO_GRIDS}")

    # In the order of a fit.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            module = self.begin(trainer, pl_module)
            module.compressed.check_grids()
            module.trains_grids = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = expect_holder(pl_module)
        if trainer.fast_dev_run and is_sharded(module.compressed.network):  # type: ignore[attr-defined]
            module.release()  # a rehearsal keeps no base to gather the parts into
        else:
            module.unite()
            module.compressed.settle()
            module.compressed.record(self.step)
            rank_zero_info("Polished: scales and minima are rounded to what their number formats store.")
        module.trains_grids = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        module = expect_holder(pl_module)
        if module.trains_grids:
            if is_sharded(module.compressed.network):
                module.release()  # not every process may have failed, and one alone cannot gather the model
            else:
                module.compressed.settle(polished=False)
            module.trains_grids = False
