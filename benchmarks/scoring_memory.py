"""Peak memory and time of scoring, beside those of a plain full backward pass of the same text.

    python benchmarks/scoring_memory.py                      a random Llama of 110 M parameters, on this device
    python benchmarks/scoring_memory.py --layers 32 --hidden 2048 --ffn 5504 --dtype bfloat16

Each pass runs in a process of its own. On a CPU the peak is that of the resident set above what it was with the model
loaded; on CUDA what was allocated. Text passes in micro-batches of ``--batch-size`` tokens everywhere; a plain backward
pass adds up the gradients of all weights. Seconds are the least of ``--repeats``, and so are those that the processors
worked, which other work on the machine disturbs less.
"""

import argparse
import json
import time

import torch
from random_llama import add_arguments, random_llama, run_alone
from transformers import LlamaForCausalLM

from qpruner.calibration.text import Calibration
from qpruner.memory import read_peak, reset_peak, tensor_bytes
from qpruner.processes import Processes
from qpruner.pruning.scores import score_units
from qpruner.records.tables import markdown_table

PASSES = ("forward", "full backward", "vectorize", "param_first", "param_second", "param_mix", "wanda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="float32")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=256, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=PASSES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given)))
        return
    results = {name: run_alone("--only", name) for name in PASSES}
    plain = results["full backward"]
    rows = [
        [
            name,
            f"{result['above'] / 2**20:,.0f}",
            f"{1 + result['above'] / result['weights']:.2f}",
            f"{result['seconds']:.2f}",
            f"{result['seconds'] / plain['seconds']:.2f}",
            f"{result['worked'] / plain['worked']:.2f}",
        ]
        for name, result in results.items()
    ]
    print(
        f"weights {plain['weights'] / 2**20:,.0f} MiB, {given.device}, {given.dtype}, {torch.get_num_threads()} "
        f"threads; {given.sequences} x {given.length} tokens, {given.batch_size} together"
    )
    header = ["pass", "MiB above weights", "peak / weights", "seconds", "of full backward", "processor time of it"]
    print(markdown_table(header, rows))


def measure(given: argparse.Namespace) -> dict[str, float]:
    device, model = torch.device(given.device), random_llama(given)
    tokens = torch.randint(0, given.vocabulary, (given.sequences, given.length))
    model(input_ids=tokens[:1, :2].to(device))  # libraries allocate what they need for themselves
    calibration = Calibration.share(tokens, Processes.alone(device), given.batch_size)
    weights = tensor_bytes(model)
    reset_peak(device)
    before = read_peak(device)
    assert before is not None
    act(given.only, model, calibration)
    after = read_peak(device)
    assert after is not None
    seconds, worked = [], []
    for _ in range(given.repeats):
        begin, began = time.perf_counter(), time.process_time()
        act(given.only, model, calibration)
        seconds.append(time.perf_counter() - begin)
        worked.append(time.process_time() - began)
    return {"above": after - before, "weights": weights, "seconds": min(seconds), "worked": min(worked)}


def act(what: str, model: LlamaForCausalLM, calibration: Calibration) -> None:
    if what not in ("forward", "full backward"):
        score_units(model, what, "sum", calibration, seed=0)
        return
    model.requires_grad_(what == "full backward")
    model.zero_grad()
    for batch in calibration.batches:
        tokens = batch.tokens.to(model.device)
        loss = model(input_ids=tokens, labels=tokens).loss * len(tokens) / calibration.num_sequences
        if what == "full backward":
            loss.backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
