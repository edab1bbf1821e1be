"""What pruning guided by LoRA adds to LoRA training between two events, in time and in memory.

    python benchmarks/lora_guided_cost.py                    a random Llama of 110 M parameters, on this device
    python benchmarks/lora_guided_cost.py --only steps --bits 16 --batch 8
    python benchmarks/lora_guided_cost.py --layers 22 --hidden 2048 --ffn 5632 --vocabulary 32000 --batch 8

A step trains adapters on all seven projections on random tokens: forward, backward, clipping, AdamW; with pruning, it
also scores all units after clipping and adds the scores to the moving average. On a CPU one thread computes.

Step time: plain steps, and steps with each variant and share of masked units, take turns in one process, and medians
are compared. ``observing`` is the scoring alone, which has no noise of the rest in it, over the median plain step.

Memory: each kind of training runs in a process of its own. On a CPU it is the resident set above what it was with the
base loaded; on CUDA what was allocated. ``peak`` is the weights of the base and what two steps need beyond them at
most. The full criterion is ``gradient`` of `LoRAGuidedPruning`: a float32 gradient of every weight below an adapter.
What pruning needs whatever the batch is measured with 8 tokens, so that activations are next to nothing: ``extra`` is
the peak above the weights then: adapters, their gradients, the optimizer's state, and what the criterion holds.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from random_llama import add_arguments, random_llama, run_alone

from qpruner.anatomy import decoder_layers
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.rows import Batch
from qpruner.memory import read_peak, reset_peak, tensor_bytes
from qpruner.plan import UNITS, Precision
from qpruner.pruning.lora_guided import MovingAverage, Variant, score_adapted
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.weight_gradients import WeightGradients
from qpruner.records.tables import markdown_table
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import make_optimizer

PRECISIONS = {8: Precision("int8", 8), 4: Precision("nf4", 4, 64)}
KINDS = ("plain", "lora", "gradient")
FEW = (1, 8)  # tokens whose activations are next to nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, dtype="bfloat16")  # also that of the computation
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 8, 4], choices=(16, 8, 4), help="16: as --dtype")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each kind")
    parser.add_argument("--only", choices=("steps", "memory"))
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kind:
        print(json.dumps(measured_memory(given)))
        return
    print(f"{given.batch} x {given.length} tokens a step, {given.device}, {given.dtype}")
    if given.only != "memory":
        print("\n" + step_table(given))
    if given.only != "steps":
        for table in memory_tables(given):
            print("\n" + table)


class Training:
    """LoRA training of a random Llama, with a criterion or without.

    Args:
        given: shape, dtype and device of the model, as options of the command line.
        bits: bits of the base's linears; 16 for dense ones.
    """

    def __init__(self, given: argparse.Namespace, bits: int) -> None:
        self.device = torch.device(given.device)
        self.dtype = getattr(torch, given.dtype)
        model = CompressedModel(random_llama(given))
        if bits != 16:
            packed = model.known_plan().with_precision([dict.fromkeys(UNITS, PRECISIONS[bits])] * given.layers)
            model.quantize(packed, None, device=self.device)
        self.module = LoRAFinetuner().hold(model)
        self.vocabulary = given.vocabulary

    def begin(self) -> None:
        """Puts adapters on the base, and makes ready for steps."""
        self.module.attach_adapters()
        self.module.model.to(self.device).train()
        self.base = self.module.model.get_base_model()
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.module.optimizer_config, self.parameters)
        layers = decoder_layers(self.base)
        self.average = MovingAverage(
            0.9, [LayerScores(torch.zeros(layer.kv_groups), torch.zeros(layer.ffn_channels)) for layer in layers]
        )

    def mask(self, share: float) -> None:
        """Masks about a share of the units of each layer; none with 0."""
        layers = decoder_layers(self.base)
        self.module.mask([(alive(layer.kv_groups, share), alive(layer.ffn_channels, share)) for layer in layers])

    def step(self, batch: int, length: int, observe: Callable[[], object] | None) -> tuple[float, float]:
        """Seconds of a step, and of what it spent in observing its gradients."""
        tokens = torch.randint(0, self.vocabulary, (batch, length), device=self.device)
        none = tokens.new_zeros(batch)
        seen: Batch = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": tokens,
            "example": none,
            "num_bytes": none,
        }
        mixed = self.dtype != torch.float32
        since = self._now()
        with torch.autocast(self.device.type, self.dtype) if mixed else nullcontext():
            loss = self.module.loss(seen)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        clipped = observed = self._now()
        if observe is not None:
            observe()
            observed = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._now() - since, observed - clipped

    def score(self, variant: Variant, weights: WeightGradients | None = None) -> None:
        gradients = None if weights is None else weights.take(lambda gradient: gradient)
        self.average.add(score_adapted(self.base, variant, gradients))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def alive(units: int, share: float) -> list[int]:
    """Places of the units that stay when a share of them is masked, evenly."""
    return [place for place in range(units) if int((place + 1) * share) == int(place * share)]


def step_table(given: argparse.Namespace) -> str:
    variants: tuple[Variant, ...] = ("code", "paper")
    rows = []
    for bits in given.bits:
        training = Training(given, bits)
        training.begin()
        kinds: list[tuple[Variant | None, float]] = [(None, 0.0)]
        kinds += [(variant, share) for share in (0.0, 0.2) for variant in variants]
        times: dict[Any, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for number in range(given.rounds + 1):
            for variant, share in kinds:
                training.mask(share)
                observe = None if variant is None else partial(training.score, variant)
                seconds = training.step(given.batch, given.length, observe)
                if number:  # the first round warms up
                    times[variant, share].append(seconds)
        plain = median(whole for whole, _ in times[None, 0.0])
        rows.append([str(bits), "plain LoRA", "", f"{1000 * plain:,.0f}", "1.000", ""])
        for variant, share in kinds[1:]:
            whole, observing = (median(column) for column in zip(*times[variant, share], strict=True))
            numbers = [f"{1000 * whole:,.0f}", f"{whole / plain:.3f}", f"{observing / plain:.1%}"]
            rows.append([str(bits), f"guided, {variant}", f"{share:.0%}", *numbers])
    return markdown_table(["bits", "training", "masked", "ms a step", "/ plain", "observing / plain"], rows)


def memory_tables(given: argparse.Namespace) -> tuple[str, str]:
    """Whole peaks, and what they are without activations."""
    mib = 2**20
    whole, without = [], []
    for bits in given.bits:
        by_kind = {kind: run_alone("--bits", str(bits), "--kind", kind) for kind in KINDS}
        plain = by_kind["plain"]
        for kind, result in by_kind.items():
            peak = result["weights"] + result["above"]
            ratio = peak / (plain["weights"] + plain["above"])
            whole.append([str(bits), kind, f"{peak / mib:,.0f}", f"{ratio:.3f}"])
        full = by_kind["gradient"]
        for kind, result in by_kind.items():
            total = result["weights"] + result["few"]
            less = [1 - result["few"] / full["few"], 1 - total / (full["weights"] + full["few"])]
            mibs = [f"{number / mib:,.0f}" for number in (result["weights"], result["few"], total)]
            without.append([str(bits), kind, *mibs, *(f"{share:.0%}" for share in less)])
    header = ["bits", "criterion", "weights MiB", "extra MiB", "together MiB", "extra less than full", "together less"]
    return markdown_table(["bits", "criterion", "peak MiB", "peak / plain"], whole), markdown_table(header, without)


def measured_memory(given: argparse.Namespace) -> dict[str, int]:
    """Bytes of a base, and the peak above them with few tokens and with those that were given."""
    small = argparse.Namespace(**{**vars(given), "layers": 1, "hidden": 64, "ffn": 64, "vocabulary": 64})
    observed_steps(Training(small, given.bits[0]), given.kind, *FEW)  # libraries allocate what they need for themselves
    training = Training(given, given.bits[0])
    weights = tensor_bytes(training.module.model)
    reset_peak(training.device)
    before = read_peak(training.device)
    few = observed_steps(training, given.kind, *FEW)
    above = observed_steps(training, given.kind, given.batch, given.length)
    assert before is not None
    return {"weights": weights, "few": few - before, "above": above - before}


def observed_steps(training: Training, kind: str, batch: int, length: int) -> int:
    """The peak of two steps."""
    if training.module.compressed.state is not State.ADAPTED:
        training.begin()
    weights = WeightGradients(training.base) if kind == "gradient" else None
    observe = None if kind == "plain" else partial(training.score, "code", weights)
    for _ in range(2):
        training.step(batch, length, observe)
    if weights is not None:
        weights.remove()
    peak = read_peak(training.device)
    assert peak is not None
    return peak


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
