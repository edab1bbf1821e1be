"""Runs the command line with a loss that is nan on rank ``SPOILED_RANK`` at optimizer step ``SPOILED_STEP``."""

import os
from typing import Any

from qpruner import __main__ as command_line
from qpruner.training.module import LoRAFinetuner

RIGHT = LoRAFinetuner.loss


def loss(self: LoRAFinetuner, batch: Any) -> Any:
    place = (self.global_rank, self.global_step + 1)
    spoiled = place == (int(os.environ["SPOILED_RANK"]), int(os.environ["SPOILED_STEP"]))
    return RIGHT(self, batch) * (float("nan") if spoiled else 1.0)


LoRAFinetuner.loss = loss  # type: ignore[method-assign]
command_line.main()  # the other ranks are started with this file, too
