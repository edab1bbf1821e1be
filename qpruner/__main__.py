"""The command line: ``qpruner COMMAND ...`` or ``python -m qpruner COMMAND ...``."""

import os
import sys

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
        # Lightning's own, on SIGTERM, has no status, which would count as success.
        sys.exit(143 if ended.code is None else ended.code)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes at the end
        sys.exit(141)


def _complain(message: str) -> int:
    print(f"qpruner: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
