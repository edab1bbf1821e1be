"""Optimizers in processes that are copies of this one."""

import os
import signal
from typing import Any

from qpruner.search import proposals


class ForkedProposer:
    """A copy of this process, which has imported all that takes a new one seconds."""

    def __init__(self, command: list[str], *, pass_fds: list[int], stderr: Any, **_: Any) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.dup2(stderr.fileno(), 2)
                proposals.serve(pass_fds[0])
            finally:
                os._exit(1)
        self.status: int | None = None

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status
