"""What llama.cpp makes of a file, asked in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

SCRIPT = Path(__file__).with_name("run_llama_cpp.py")


def ask_llama_cpp(place: Path, **request: Any) -> dict[str, Any]:
    """The answer to a request; see ``run_llama_cpp.py``.

    Args:
        place: folder for the request and its answer.
        **request: parts of the request.
    """
    (place / "request.json").write_text(json.dumps(request, default=str))
    command = [sys.executable, str(SCRIPT), str(place / "request.json"), str(place / "answer.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    with numpy.load(place / "answer.npz") as answer:
        parts: dict[str, Any] = {name: answer[name] for name in answer}
    if "logits" in parts:
        parts["logits"] = torch.from_numpy(parts["logits"])
    return {name: json.loads(str(part)) if name.endswith("tokenized") else part for name, part in parts.items()}
