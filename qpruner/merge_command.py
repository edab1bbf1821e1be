"""`qpruner merge`: a copy of a run's model with its adapters in its weights."""

from pathlib import Path
from typing import Literal

from qpruner.options.functions import run_function


def merge_command(arguments: list[str]) -> None:
    run_function("qpruner merge", merge, arguments)


def merge(run: Path, output: Path, dtype: Literal["bfloat16", "float16"] = "bfloat16", packed: bool = False) -> None:
    """Merges the adapters of a run's model into a copy without any, and prints what that changed.

    The copy is dense, in 16 bits: packed again, its weights would be rounded a second time, which costs more than the
    adapters gave. Adapters that were trained with --model.lora.pooled can be folded into the minima of packed weights,
    and then the copy stays packed, with no weight rounded anew. Only the run's model is needed; where its data can
    still be had, the perplexity is measured before and after.

    Args:
        run: folder of a finished run, such as runs/quickstart, or of its model.
        output: folder to write; it must not be there yet.
        dtype: number format of a dense copy.
        packed: whether the copy stays packed, with pooled adapters in its minima.
    """
    from qpruner.dense_copy import (
        merge_run,  # what loads and measures models takes seconds to import, and help needs it not
    )

    merge_run(run, output, dtype, packed=packed)
