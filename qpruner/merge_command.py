"""`qpruner merge`: copies a run's model and merges the adapters into its weights."""

from pathlib import Path
from typing import Literal

from qpruner.options.functions import run_function


def merge_command(arguments: list[str]) -> None:
    run_function("qpruner merge", merge, arguments)


def merge(run: Path, output: Path, dtype: Literal["bfloat16", "float16"] = "bfloat16", packed: bool = False) -> None:
    """Copies a run's model, merges its adapters into the weights of the copy, and prints what that changed.

    The copy is dense, in 16 bits: packing its weights would round them a second time, which costs more than the
    adapters gain. Adapters that were trained with --model.lora.pooled can instead be folded into the minima of packed
    weights; the copy then stays packed, and no weight is requantized. Only the run's model is needed; if its data are
    still available, the perplexity is measured before and after.

    Args:
        run: folder of a finished run, such as runs/quickstart, or of its model.
        output: folder to write, which must not exist yet.
        dtype: dtype of a dense copy.
        packed: whether the copy stays packed, with pooled adapters folded into its minima.

    Raises:
        UserError: there is no such run, values are not finite, adapters cannot be folded into minima, or the output
            exists or cannot be written.
    """
    from qpruner.dense_copy import (
        merge_run,  # takes seconds to import, and --help does without
    )

    merge_run(run, output, dtype, packed=packed)
