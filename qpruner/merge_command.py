"""`qpruner merge`: a dense 16-bit copy of a run's model, with its adapters in its weights."""

from pathlib import Path
from typing import Literal

from qpruner.options.functions import run_function


def merge_command(arguments: list[str]) -> None:
    run_function("qpruner merge", merge, arguments)


def merge(run: Path, output: Path, dtype: Literal["bfloat16", "float16"] = "bfloat16") -> None:
    """Merges the adapters of a run's model into a dense 16-bit copy, and prints what that changed.

    The copy is narrower than the dense model where that was pruned, and loads without qpruner where all layers are
    equally wide. It is never packed again: rounding a second time costs more than the adapters gave. Only the run's
    model is needed; where its data can still be had, the perplexity is measured before and after.

    Args:
        run: folder of a finished run, such as runs/quickstart, or of its model.
        output: folder to write; it must not be there yet.
        dtype: number format of the copy.
    """
    from qpruner.dense_copy import (
        merge_run,  # what loads and measures models takes seconds to import, and help needs it not
    )

    merge_run(run, output, dtype)
