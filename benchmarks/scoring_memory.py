"""Peak memory and time of scoring, beside those of a plain full backward pass of the same text.

    python benchmarks/scoring_memory.py                      a random Llama of 110 M parameters, on this device
    python benchmarks/scoring_memory.py --layers 32 --hidden 2048 --ffn 5504 --dtype bfloat16

The peak is that of a process for each pass: on a CPU the resident set above what it was with the model loaded, on CUDA
what was allocated. Time is taken of one pass after the other, in turn, in one process; of the seconds and of those that
the processors worked, which other work on the machine disturbs less, the least of ``--repeats`` count. Text passes in
micro-batches of ``--batch-size`` tokens everywhere; a plain backward pass adds up the gradients of all weights.
"""

import argparse
import json
import math
import time

import torch
from random_llama import add_arguments, random_llama, run_alone
from transformers import LlamaForCausalLM

from qpruner.calibration.text import Calibration
from qpruner.memory import read_peak, reset_peak, tensor_bytes
from qpruner.processes import Processes
from qpruner.pruning.scores import score_units
from qpruner.records.tables import markdown_table

PLAIN = "full backward"
PASSES = ("forward", PLAIN, "vectorize", "param_first", "param_second", "param_mix", "wanda")


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
        print(json.dumps(peak(given)))
        return
    peaks = {name: run_alone("--only", name) for name in PASSES}
    seconds, worked = timed(given)
    rows = [
        [
            name,
            f"{peaks[name]['above'] / 2**20:,.0f}",
            f"{1 + peaks[name]['above'] / peaks[name]['weights']:.2f}",
            f"{seconds[name]:.2f}",
            f"{seconds[name] / seconds[PLAIN]:.2f}",
            f"{worked[name] / worked[PLAIN]:.2f}",
        ]
        for name in PASSES
    ]
    print(
        f"weights {peaks[PLAIN]['weights'] / 2**20:,.0f} MiB, {given.device}, {given.dtype}, "
        f"{torch.get_num_threads()} threads; {given.sequences} x {given.length} tokens, {given.batch_size} together"
    )
    header = ["pass", "MiB above weights", "peak / weights", "seconds", f"of {PLAIN}", f"processor time of {PLAIN}"]
    print(markdown_table(header, rows))


def prepared(given: argparse.Namespace) -> tuple[LlamaForCausalLM, Calibration]:
    model = random_llama(given)
    tokens = torch.randint(0, given.vocabulary, (given.sequences, given.length))
    model(input_ids=tokens[:1, :2].to(model.device))  # libraries allocate what they need for themselves
    return model, Calibration.share(tokens, Processes.alone(model.device), given.batch_size)


def peak(given: argparse.Namespace) -> dict[str, int]:
    """Bytes above the weights, and those of the weights."""
    model, calibration = prepared(given)
    weights = tensor_bytes(model)
    reset_peak(model.device)
    before = read_peak(model.device)
    assert before is not None
    act(given.only, model, calibration)
    after = read_peak(model.device)
    assert after is not None
    return {"above": after - before, "weights": weights}


def timed(given: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds, and seconds of work of all processors, of each pass."""
    model, calibration = prepared(given)
    seconds, worked = dict.fromkeys(PASSES, math.inf), dict.fromkeys(PASSES, math.inf)
    for _ in range(given.repeats):
        for name in PASSES:
            begin, began = time.perf_counter(), time.process_time()
            act(name, model, calibration)
            worked[name] = min(worked[name], time.process_time() - began)
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds, worked


def act(name: str, model: LlamaForCausalLM, calibration: Calibration) -> None:
    model.requires_grad_(name == PLAIN)
    if name in ("forward", PLAIN):
        for batch in calibration.batches:
            tokens = batch.tokens.to(model.device)
            loss = model(input_ids=tokens, labels=tokens).loss * len(tokens) / calibration.num_sequences
            if name == PLAIN:
                loss.backward()
        model.zero_grad()
    else:
        score_units(model, name, "sum", calibration, seed=0)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
