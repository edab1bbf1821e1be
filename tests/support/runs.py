"""Runs from the command line, and what their folders hold."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qpruner.files import read_json
from qpruner.plan import Precision

KILL_AT = str(Path(__file__).with_name("kill_at.py"))
SPOIL_ON_RANK = str(Path(__file__).with_name("spoil_on_rank.py"))


def in_own_process(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})}
    )


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


RESULTS = """
import hashlib, sys, torch, qpruner
logits = qpruner.load_compressed(sys.argv[1])(input_ids=torch.arange(20).view(2, 10)).logits
print(hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest())
"""

NAMES = ["dense", "pruned", "quantized", "quantized + LoftQ", "recovered"]

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
QUANTIZATION = {"class_path": "MixedPrecisionQuantization", "init_args": {"bits": [8, 4]}}


def stages(folder: Path) -> list[dict[str, Any]]:
    return read_json(folder / "summary.json")["stages"]


def payload(path: Path) -> int:
    """Bytes of the tensors in a safetensors file; the header and its length are all else in it."""
    stored = sum(tensor.nbytes for tensor in load_file(path).values())
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - stored == 8 + header
    return stored
