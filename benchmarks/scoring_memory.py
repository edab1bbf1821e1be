"""Peak memory of scoring, as a multiple of the weights, beside a plain full backward pass.

    python benchmarks/scoring_memory.py                      a random Llama of 110 M parameters, on this device
    python benchmarks/scoring_memory.py --layers 32 --hidden 2048 --ffn 5504 --dtype bfloat16

Each pass runs in a process of its own. On a CPU the peak is that of the resident set above what it was with the model
loaded; on CUDA what was allocated. Activations are what a forward pass keeps for a plain backward pass, measured alike.
"""

import argparse
import json

import torch
from random_llama import add_arguments, random_llama, run_alone
from transformers import LlamaForCausalLM

from qpruner.calibration.text import Calibration
from qpruner.memory import read_peak, reset_peak, tensor_bytes
from qpruner.processes import Processes
from qpruner.pruning.scores import score_units
from qpruner.runs.tables import markdown_table

PASSES = ("activations", "full backward", "vectorize", "param_first", "param_second", "param_mix", "wanda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="float32")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--only", choices=PASSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given)))
        return
    found = {name: run_alone("--only", name) for name in PASSES}
    kept = found["activations"]["above"]
    rows = [
        [
            name,
            f"{result['above'] / 2**20:,.0f}",
            f"{1 + result['above'] / result['weights']:.2f}",
            f"{1 + max(0, result['above'] - kept) / result['weights']:.2f}",
        ]
        for name, result in found.items()
    ]
    print(f"weights {found['activations']['weights'] / 2**20:,.0f} MiB, {given.device}, {given.dtype}")
    header = ["pass", "MiB above weights", "peak / weights", "peak / weights, without activations"]
    print(markdown_table(header, rows))


def measure(given: argparse.Namespace) -> dict[str, int]:
    device, model = torch.device(given.device), random_llama(given)
    tokens = torch.randint(0, given.vocabulary, (given.sequences, given.length))
    model(input_ids=tokens[:1, :2].to(device))  # libraries allocate what they need for themselves
    reset_peak(device)
    before = read_peak(device)
    assert before is not None
    if given.only in ("activations", "full backward"):
        loss = forward(model, tokens.to(device), backward=given.only == "full backward")
        assert loss.isfinite()
    else:
        calibration = Calibration.share(tokens, Processes.alone(device), batch_size=4096)
        score_units(model, given.only, "sum", calibration, seed=0)
    after = read_peak(device)
    assert after is not None
    return {"above": after - before, "weights": tensor_bytes(model)}


def forward(model: LlamaForCausalLM, tokens: torch.Tensor, *, backward: bool) -> torch.Tensor:
    """The loss, with what a backward pass needs kept, and the gradients of all weights if wanted."""
    model.requires_grad_(True)
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    if backward:
        loss.backward()
    return loss


if __name__ == "__main__":
    main()
