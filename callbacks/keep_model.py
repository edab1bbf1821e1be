"""Keeps what a fit makes of a model: the base before training, base and adapters after it."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from qpruner.compressed import CompressedModel, State
from qpruner.training.holding import expect_holder
from qpruner.training.sharding import splits


class KeepModel(Callback):
    """Writes the compressed base before a fit trains on it, and the adapters, as trained, at the end.

    Stands behind every callback that compresses, and behind one that looks whether the result is of any use: what
    raises an error there leaves nothing kept.

    ```yaml
    trainer:
      callbacks:
        - class_path: qpruner.callbacks.KeepModel
          init_args: {before_training: models/x, after_training: models/x}
    ```

    setup
        The base goes to ``before_training``, where callbacks have changed it in this session, and where the Trainer is
        going to split it among devices, after which none has it whole. One that an earlier session has kept is taken
        from where it lies, if that is the ``kept_in`` of the module, as in a run it is.
    on_fit_end
        Where the base is still that of ``before_training``, and the two folders are one, the adapters are put to it;
        else base and adapters go to ``after_training``. That holds for a base that nothing has compressed, too, of a
        family that can be compressed; of others nothing is written.

    Args:
        before_training: folder of the base that the fit trains on.
        after_training: folder of the result; another one where the fit prunes while it trains.

    Raises:
        UserError: the disk has no room.
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
