"""The command line: ``qpruner COMMAND ...`` or ``python -m qpruner COMMAND ...``."""

import os
import sys
from typing import Any

from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.quiet import quieten


def main() -> None:
    """Runs a command; reports a user's mistake in a line or two, without a traceback, with exit status 2."""
    quieten()
    try:
        run(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_complain(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as ended:
        sys.exit(_status(ended))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at the end
        sys.exit(141)


def _status(ended: SystemExit) -> Any:
    """The status of an exit; after SIGINT Lightning has 1, and after SIGTERM none, which would count as success."""
    if isinstance(ended.__context__, KeyboardInterrupt):
        return 130
    return 143 if ended.code is None else ended.code


def _complain(message: str) -> int:
    print(f"qpruner: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
