"""`qpruner report`: writes the report of a run again, from the contents of its folder."""

from pathlib import Path

from qpruner.errors import UserError
from qpruner.options.functions import run_function
from qpruner.records.folder import RunFolder
from qpruner.records.report import Summary, show_summary, write_report
from qpruner.records.search import SearchResults, variants_table, write_search_report


def report_command(arguments: list[str]) -> None:
    run_function("qpruner report", report, arguments)


def report(run: Path) -> None:
    """Writes the report of a run again, from the contents of its folder, and prints its table.

    Args:
        run: folder of the run, such as runs/quickstart.

    Raises:
        UserError: the folder has no results yet.
    """
    folder = RunFolder(run)
    if folder.results.exists():
        results = SearchResults.read(folder.results)
        write_search_report(folder, results)
        print(f"\n{variants_table(results)}")
        return
    if not folder.summary.exists():
        raise UserError(
            f"{str(folder.path)!r} holds no summary.json: no fit has measured anything there yet, "
            f"and no search has ended."
        )
    write_report(folder)
    show_summary(Summary.read(folder.summary))
