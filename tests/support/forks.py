"""Commands in processes of their own that one import of the libraries serves: it takes longer than most of them.

A server imports what the command line does and makes a copy of itself for each command, which ends as Python ends. What
a command sees of the process before it, such as other threads or ranks, is not so; that is for `in_own_process`.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from threading import RLock, Timer
from typing import Any

from support import environment


@cache
def _server() -> "subprocess.Popen[str]":
    """Ends with this process, whose end it reads."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )


def in_fork(*command: str, seconds: float = 300) -> "subprocess.CompletedProcess[str]":
    """As `in_own_process`, with ``-m MODULE ARGUMENTS`` or ``SCRIPT ARGUMENTS``."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        streams = [str(Path(folder) / name) for name in ("out", "err")]
        request = {"command": command, "streams": streams, "environment": dict(os.environ), "folder": os.getcwd()}
        print(json.dumps(request), file=server.stdin, flush=True)
        timer = Timer(seconds, os.kill, (int(server.stdout.readline()), 9))
        timer.start()
        status = int(server.stdout.readline())
        timed_out = timer.finished.is_set()
        timer.cancel()
        out, err = (Path(stream).read_text() for stream in streams)
    if timed_out:
        raise subprocess.TimeoutExpired(command, seconds, out, err)
    return subprocess.CompletedProcess(command, status, out, err)


def _next_command() -> list[str]:
    """Returns in a copy, once for each."""
    import peft  # noqa: F401
    import tensorboard  # noqa: F401
    import torch
    from tqdm import tqdm
    from transformers.models.llama import modeling_llama  # noqa: F401

    from qpruner import cli, datamodules  # noqa: F401
    from qpruner.quiet import quieten
    from qpruner.search import trial  # noqa: F401

    quieten()
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # its own lock is one of all copies, who would wait for one that was killed with it
    for line in sys.stdin:
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        request: dict[str, Any] = json.loads(line)
        streams = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in request["streams"]]
        for given, wanted in zip([os.open(os.devnull, os.O_RDONLY), *streams], range(3), strict=True):
            os.dup2(given, wanted)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        return request["command"]
    sys.exit()


if __name__ == "__main__":
    first, *rest = _next_command()
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
