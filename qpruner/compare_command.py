"""`qpruner compare`: compares runs and evaluations side by side."""

from pathlib import Path

from qpruner.files import check_place
from qpruner.options.functions import run_function
from qpruner.records.comparison import compare_folders, describe, write_comparison


def compare_command(arguments: list[str]) -> None:
    run_function("qpruner compare", compare, arguments)


def compare(runs: list[Path], *, names: list[str] | None = None, output: Path | None = None) -> None:
    """Prints the results of several models side by side, and how each differs from the first on the same questions.

    Args:
        runs: folders of runs, or of results of qpruner evaluate; all others are compared with the first.
        names: name of each model, in the order of the folders; null for the names of the folders.
        output: folder for comparison.md, comparison.json and pictures; null to print only.

    Raises:
        UserError: a folder has no results, a file is damaged, the names do not match the runs, or the output cannot be
            written.
    """
    if output is not None:
        output = output.expanduser()
        check_place(output)
    comparison = compare_folders([run.expanduser() for run in runs], names)
    print("\n" + "\n".join(describe(comparison)))
    if output is not None:
        write_comparison(comparison, output)
        print(f"\nWritten to {output}: comparison.md with its pictures, and comparison.json.")
