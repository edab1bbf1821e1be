"""The command line: ``qpruner COMMAND ...`` or ``python -m qpruner COMMAND ...``."""

import sys

from qpruner.errors import UserError
from qpruner.quiet import quieten


def main() -> None:
    """Runs a command; a user's mistake is told in a line or two, without a traceback, with exit status 2."""
    quieten()
    try:
        # Imported here, so that `import qpruner` stays light and an interrupt while torch loads ends quietly.
        from qpruner.cli import run

        run(sys.argv[1:])
    except UserError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(message: str) -> int:
    print(f"qpruner: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
