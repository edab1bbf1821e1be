"""The command line: ``qpruner COMMAND ...`` or ``python -m qpruner COMMAND ...``."""

import sys

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.quiet import quieten


def main() -> None:
    """Runs a command; a user's mistake is told in a line or two, without a traceback, with exit status 2."""
    quieten()
    try:
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
