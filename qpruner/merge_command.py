"""`qpruner merge`: a dense 16-bit copy of a run's model, with its adapters in its weights."""

import argparse
from pathlib import Path


def merge_command(arguments: list[str]) -> None:
    """Merges the adapters of a run's model into a dense 16-bit copy, and prints what that changed.

    The copy is narrower than the dense model where that was pruned, and loads without qpruner where all layers are
    equally wide. It is never packed again: rounding a second time costs more than the adapters gave. Only the run's
    model is needed; where its data can still be had, the perplexity is measured before and after.
    """
    parser = argparse.ArgumentParser("qpruner merge", description=merge_command.__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished run, such as runs/quickstart, or of its model")
    parser.add_argument("output", type=Path, help="folder to write; it must not be there yet")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: %(default)s")
    given = parser.parse_args(arguments)
    from qpruner.merge import merge_run  # what loads and measures models takes seconds to import, and help needs it not

    merge_run(given.run, given.output, given.dtype)
