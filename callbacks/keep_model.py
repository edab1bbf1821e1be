"""Saves what a fit produces: the base before training, and base and adapters after it."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.compressed import CompressedModel, State
from qpruner.training.holding import expect_holder
from qpruner.training.sharding import splits


class KeepModel(Callback):
    """Saves the compressed base before a fit trains on it, and the trained adapters at the end.

    It comes after every callback that compresses, and after any callback that checks whether the result is usable: if
    that one raises an error, nothing is saved.

    ```yaml
    trainer:
      callbacks:
        - class_path: qpruner.callbacks.KeepModel
          init_args: {before_training: models/x, after_training: models/x}
    ```

    setup
        Saves the base in ``before_training`` if callbacks have changed it in this session, or if the Trainer is about
        to split it among devices, after which no device holds all of it. A base that an earlier session has saved is
        used from where it is, provided that this is the module's ``kept_in``, as it is in a run.
    on_fit_end
        If the base is still the one in ``before_training``, and the two folders are the same, adds the adapters to it;
        otherwise saves base and adapters in ``after_training``. This includes a base that nothing has compressed, if
        its family can be compressed; for other families nothing is written.

    Args:
        before_training: folder for the base that the fit trains on.
        after_training: folder for the result; a different one if the fit prunes during training.

    Raises:
        UserError: there is not enough space on the disk.
    """

    def __init__(self, before_training: str | Path, after_training: str | Path) -> None:
        self.before_training = Path(before_training)
        self.after_training = Path(after_training)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        module = expect_holder(pl_module)
        module.load_base()
        model = module.compressed
        kept_now = model.base_state is not State.DENSE or (splits(trainer.strategy) and model.plan is not None)
        if kept_now and not self._keeps(model, self.before_training):
            module.keep_base(self.before_training)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = expect_holder(pl_module)
        if trainer.fast_dev_run or module.compressed.plan is None:  # type: ignore[attr-defined]
            return
        if self._keeps(module.compressed, self.after_training):
            module.keep_adapters()
        else:
            module.keep_base(self.after_training, trained=True)

    def _keeps(self, model: CompressedModel, folder: Path) -> bool:
        return model.kept is not None and model.kept.path == folder
