"""Runs the command line with a loss that is nan on rank ``SPOILED_RANK`` at optimizer step ``SPOILED_STEP``."""

import os
from typing import Any

from qpruner import __main__ as command_line
from qpruner.training.module import LoRAFinetuner

RIGHT = LoRAFinetuner.token_nll


def token_nll(self: LoRAFinetuner, batch: Any) -> Any:
    place = (self.global_rank, self.global_step + 1)
    spoiled = place == (int(os.environ["SPOILED_RANK"]), int(os.environ["SPOILED_STEP"]))
    losses = RIGHT(self, batch)
    return losses * float("nan") if spoiled and losses.requires_grad else losses


LoRAFinetuner.token_nll = token_nll  # type: ignore[method-assign]
command_line.main()  # the other ranks are started with this file, too
