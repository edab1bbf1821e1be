"""`qpruner compare`: runs and evaluations side by side."""

from pathlib import Path

from qpruner.options.functions import run_function
from qpruner.records.comparison import compare_folders, describe, write_comparison


def compare_command(arguments: list[str]) -> None:
    run_function("qpruner compare", compare, arguments)


def compare(runs: list[Path], *, names: list[str] | None = None, output: Path | None = None) -> None:
    """Prints what was measured of models side by side, and how each differs from the first on the same questions.

    Args:
        runs: folders of runs, or of what qpruner evaluate wrote; the others are compared with the first.
        names: name of each, in the same order; null for the names of the folders.
        output: folder to write comparison.md, comparison.json and pictures to; null to print only.

    Raises:
        UserError: a folder that nothing was measured in, a damaged file, or names that do not fit the runs.
    """
    comparison = compare_folders([run.expanduser() for run in runs], names)
    print("\n" + "\n".join(describe(comparison)))
    if output is not None:
        write_comparison(comparison, output.expanduser())
        print(f"\nWritten to {output}: comparison.md with its pictures, and comparison.json.")
