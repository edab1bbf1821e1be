"""A model whose blocks are held in one of two widths, its bank, and the loss of an assignment of widths to blocks."""

import argparse
import random
from contextlib import nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from studies import Row, add_arguments, evaluated, evaluated_on, name_of, recovery, study_data

from qpruner.calibration.text import Calibration
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules import TextDataModule
from qpruner.datamodules.base import TokenDataModule
from qpruner.plan import UNITS, Precision
from qpruner.processes import Processes
from qpruner.pruning.rounds import prune_
from qpruner.pruning.scores import score_units
from qpruner.pruning.selection import SelectionConfig
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import fill, fill_folder
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

PRECISIONS = {
    2: Precision("affine-double", 2, 64),
    3: Precision("affine-double", 3, 64),
    4: Precision("nf4", 4, 64),
    8: Precision("int8", 8),
}
MOST_BLOCKS = 6
"""Blocks of which all assignments are measured."""


def add_study_arguments(parser: argparse.ArgumentParser, *, steps: int) -> None:
    add_arguments(parser, steps=steps)
    parser.add_argument("--widths", type=int, nargs=2, default=[4, 8], help="bits that a block may have")
    parser.add_argument("--ratio", type=float, default=0.2, help="of all parameters, taken out first")
    parser.add_argument("--share", type=float, default=0.25, help="of the validation text, from its start")
    parser.add_argument(
        "--texts", nargs="+", help="in place of --validation: NAME=FILE:ROWS, the first rows of each to report on"
    )
    parser.add_argument("--text-length", type=int, default=512, help="tokens in a row of --texts")
    parser.add_argument("--sample", type=int, default=40, help=f"assignments, if above {MOST_BLOCKS} blocks")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of an optimizer step")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--accelerator", default="auto", help="as Lightning's Trainer has it")
    parser.add_argument("--folder", type=Path, help="keeps the bank and the sensitivities for other processes")
    parser.add_argument("--sequences", type=int, default=64, help="on which sensitivities are found")
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2, 4], help="random assignments of the others")


class BlockStudy:
    """A pruned model, its bank, and the measurement of one assignment.

    Args:
        given: options of the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.precisions = [PRECISIONS[bits] for bits in sorted(given.widths)]
        self.device = recovery(0, [], accelerator=given.accelerator, devices=1).strategy.root_device
        self.data = cache(lambda seed: study_data(given, seed))
        self.model = pruned(given.base, given.ratio, self.data(0), given.dtype)
        self.plan = self.model.known_plan()
        self.num_blocks = self.plan.architecture.num_layers
        self.loftq = LoftQSettings(8, 2.0, LoRAFinetuner(given.base).lora.target_modules, 1, 0)
        if given.folder is None:
            self.bank = fill(self.model.network, self.precisions, self.loftq, device=self.device)
        else:
            self.bank = fill_folder(
                given.folder / "bank",
                self.model.network,
                self.precisions,
                self.loftq,
                base=f"{name_of(given.base)} {given.ratio}",
                processes=Processes.alone(self.device),
            )
        self.texts = [text_of(given, text) for text in given.texts or ()]

    @property
    def vectors(self) -> list[str]:
        """The assignments that are measured: all, or some at random with half of the blocks in the wider one."""
        if self.num_blocks <= MOST_BLOCKS:
            return vectors_of(self.num_blocks, self.given.widths)
        narrow, wide = map(str, sorted(self.given.widths))
        drawn: dict[str, None] = {}
        draw = random.Random(0)
        while len(drawn) < self.given.sample:
            chosen = draw.sample(range(self.num_blocks), self.num_blocks // 2)
            drawn["".join(wide if block in chosen else narrow for block in range(self.num_blocks))] = None
        return list(drawn)

    def key(self, vector: str, steps: int, seed: int, lr: float) -> Row:
        """What tells a row from the others; options that are as they always were are left out."""
        given = self.given
        key: Row = {"base": name_of(given.base), "ratio": given.ratio}
        if given.texts:
            key |= {"texts": {name: rows for name, rows, _ in self.texts}, "text_length": given.text_length}
        else:
            key["share"] = given.share
        if given.dtype != "float32":
            key["dtype"] = given.dtype
        if steps and (given.batch_size, given.max_length) != (16, 256):
            key |= {"batch_size": given.batch_size, "max_length": given.max_length}
        return key | {"steps": steps, "lr": lr if steps else 0, "seed": seed, "bits": vector}

    def assemble(self, vector: str) -> None:
        plan = self.plan.with_precision([dict.fromkeys(UNITS, PRECISIONS[int(bits)]) for bits in vector])
        self.model.quantize(plan, self.loftq, device=self.device, bank=self.bank)

    def measure(self, key: Row) -> Row:
        """The loss of an assignment, after some steps from the start that LoftQ gives, or else of the base alone."""
        self.assemble(key["bits"])
        given, data = self.given, self.data(key["seed"])
        optimizer = OptimizerConfig(lr=key["lr"] or given.lr, warmup_steps=max(1, key["steps"] // 4))
        module = LoRAFinetuner(given.base, optimizer=optimizer, seed=key["seed"]).hold(self.model)
        trainer = recovery(key["steps"], [], accelerator=given.accelerator, devices=1)
        if key["steps"]:
            trainer.fit(module, datamodule=data)
        with nullcontext() if key["steps"] else module.adapters_disabled():
            losses = self._losses(trainer, module, data)
        if self.model.state is State.ADAPTED:
            self.model.detach()  # the base is as it was
        return losses

    def _losses(self, trainer: L.Trainer, module: LoRAFinetuner, data: TokenDataModule) -> Row:
        if not self.texts:
            return {"loss": round(evaluated(trainer, module, data, self.given.share)["loss"], 6)}
        results = {name: evaluated_on(trainer, module, text, rows) for name, rows, text in self.texts}
        tokens = sum(result["tokens"] for result in results.values())
        mean = sum(result["loss"] * result["tokens"] for result in results.values()) / tokens
        return {"loss": round(mean, 6), "losses": {name: round(result["loss"], 6) for name, result in results.items()}}


def vectors_of(num_blocks: int, widths: list[int]) -> list[str]:
    """All assignments of two widths, such as ``484448``, the narrow ones first."""
    return ["".join(bits) for bits in product(map(str, sorted(widths)), repeat=num_blocks)]


def text_of(given: argparse.Namespace, text: str) -> tuple[str, int, TextDataModule]:
    """Name of a text, number of its rows that count, and the text: of ``NAME=FILE:ROWS``."""
    name, _, rest = text.partition("=")
    file, _, rows = rest.rpartition(":")
    data = TextDataModule(
        tokenizer=given.base, validation=file, held_out=0.0, layout="packed", max_length=given.text_length
    )
    return name, int(rows), data


def pruned(base: str, ratio: float, data: TokenDataModule, dtype: Any = "float32") -> CompressedModel:
    """A model with a share of its parameters taken out, as `StructuredPruning` does it without compensation."""
    model = CompressedModel.load(base, dtype=dtype)
    if ratio == 0:
        return model
    tokens = data.calibration(10, 64)
    calibration = Calibration.share(tokens, Processes.alone(), batch_size=4096)
    prune_(
        model.network,
        model.known_plan().architecture,
        ratio=ratio,
        rounds=1,
        selection=SelectionConfig(scope="local"),
        score=lambda network: score_units(network, "param_first", "sum", calibration, seed=0),
        narrow=model.prune,
    )
    return model


def setup_torch(given: argparse.Namespace) -> None:
    """One thread, so that rows are the same on every machine; full float32 on an accelerator."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
