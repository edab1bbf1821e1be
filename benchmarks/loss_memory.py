"""Peak memory and time of a loss and its gradient from hidden states in chunks, beside those from whole logits.

    python benchmarks/loss_memory.py                               4 x 2,048 tokens, 151,936 words, bfloat16
    python benchmarks/loss_memory.py --rows 2 --length 1024        a quarter of them

Each way runs in a process of its own, on the head of a language model alone: what comes before it is the same in all
of them. ``torch`` is torch's own ``linear_cross_entropy``, which knows neither packed heads nor capped logits. The
error is that of the mean loss, against float64.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from random_llama import run_alone
from torch import Tensor, nn

from qpruner.likelihood import Head, nll_of_targets
from qpruner.memory import read_peak, reset_peak
from qpruner.records.tables import markdown_table

WAYS = ("whole", "chunks", "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given)))
        return
    results = {way: run_alone("--only", way) for way in WAYS}
    whole = results["whole"]
    rows = [
        [
            way,
            f"{result['above'] / 2**20:,.0f}",
            f"{result['above'] / whole['above']:.3f}",
            f"{result['seconds']:.1f}",
            f"{result['seconds'] / whole['seconds']:.2f}",
            f"{result['error']:.1e}",
        ]
        for way, result in results.items()
    ]
    print(f"{given.rows} x {given.length} tokens, {given.vocabulary:,} words, {given.dtype}, {given.device}")
    print(markdown_table(["way", "MiB above weights", "of whole", "seconds", "of whole", "error"], rows))


def measure(given: argparse.Namespace) -> dict[str, float]:
    device = torch.device(given.device)
    torch.manual_seed(0)
    linear = nn.Linear(given.hidden, given.vocabulary, bias=False, device=device, dtype=getattr(torch, given.dtype))
    linear.requires_grad_(False)
    hidden = 3 * torch.randn(given.rows * given.length, given.hidden, device=device, dtype=linear.weight.dtype)
    targets = torch.randint(given.vocabulary, (len(hidden),), device=device)
    sample = slice(0, 64)
    logits = hidden[sample].double() @ linear.weight.double().T
    error = abs(
        float(loss(given.only, linear, hidden[sample], targets[sample]) - F.cross_entropy(logits, targets[sample]))
    )
    del logits
    hidden.requires_grad_()
    reset_peak(device)
    before, since = read_peak(device), time.perf_counter()
    loss(given.only, linear, hidden, targets).backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - since, read_peak(device)
    assert before is not None and peak is not None
    return {"above": peak - before, "seconds": seconds, "error": error}


def loss(way: str, linear: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    if way == "whole":
        return F.cross_entropy(linear(hidden).float(), targets)
    if way == "torch":
        return F.linear_cross_entropy(hidden, linear.weight, targets, options=torch.nn.LinearCrossEntropyOptions())
    return nll_of_targets(Head(linear), hidden, targets).mean()


if __name__ == "__main__":
    main()
