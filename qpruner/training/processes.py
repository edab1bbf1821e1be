"""The processes of a Trainer."""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from qpruner.processes import Processes


def processes_of(trainer: Trainer) -> Processes:
    """The processes of a Trainer whose strategy has set up its environment, as in ``setup`` of a callback."""
    strategy: Any = trainer.strategy

    def reduce(tensor: Tensor) -> Tensor:
        total: Tensor = strategy.reduce(tensor, reduce_op="sum")
        return total

    return Processes(
        device=strategy.root_device,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        forward_context=trainer.precision_plugin.forward_context,
        reduce=reduce,
        broadcast=strategy.broadcast,
        precision=str(trainer.precision),
    )
