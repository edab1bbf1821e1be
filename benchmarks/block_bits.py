"""The loss of every assignment of 4 and 8 bits to the blocks of a pruned model, as it is and after a short recovery.

    python benchmarks/block_bits.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows rows.jsonl
    python benchmarks/block_bits.py --base qpruner/stories --rows rows.jsonl --lr 3e-4

For six blocks these are 64, few enough to measure all. The rows are the truth that `benchmarks/allocation.py` holds
methods of allocation to. A row that is in the file already is not computed again.
"""

import argparse
from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from studies import Row, add_arguments, complete, evaluated, name_of, recovery, study_data

from qpruner.calibration.text import Calibration
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules.base import TokenDataModule
from qpruner.plan import UNITS, Precision
from qpruner.processes import Processes
from qpruner.pruning.rounds import prune_
from qpruner.pruning.scores import score_units
from qpruner.pruning.selection import SelectionConfig
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import fill
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

PRECISIONS = {4: Precision("nf4", 4, 64), 8: Precision("int8", 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, steps=20)
    parser.add_argument("--ratio", type=float, default=0.2, help="of all parameters, taken out first")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--share", type=float, default=0.25, help="of the validation text, from its start")
    given = parser.parse_args()
    study = Study(given)
    complete(given, list(study.wanted()), study.measure)


class Study:
    """A pruned model, its bank, and the measurement of one assignment.

    Args:
        given: options of the command line.
    """

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.data = cache(partial(study_data, given))
        self.model = pruned(given.base, given.ratio, self.data(0))
        self.plan = self.model.known_plan()
        self.loftq = LoftQSettings(8, 2.0, LoRAFinetuner(given.base).lora.target_modules, 1, 0)
        self.bank = fill(self.model.network, list(PRECISIONS.values()), self.loftq, device=torch.device("cpu"))

    def wanted(self) -> Any:
        """What tells a row from the others: first all without recovery, then all with it, seed by seed."""
        given = self.given
        shared = {"base": name_of(given.base), "ratio": given.ratio, "share": given.share}
        vectors = ["".join(bits) for bits in product("48", repeat=self.plan.architecture.num_layers)]
        for steps, seed in [(0, 0), *((given.steps, seed) for seed in given.seeds)]:
            for vector in vectors:
                yield shared | {"steps": steps, "lr": given.lr if steps else 0, "seed": seed, "bits": vector}

    def measure(self, key: Row) -> Row:
        plan = self.plan.with_precision([dict.fromkeys(UNITS, PRECISIONS[int(bits)]) for bits in key["bits"]])
        self.model.quantize(plan, self.loftq, device=torch.device("cpu"), bank=self.bank)
        loss = short_fit(self.given, self.model, self.data(key["seed"]), key)
        return {"loss": round(loss, 6)}


def short_fit(given: argparse.Namespace, model: CompressedModel, data: TokenDataModule, key: Row) -> float:
    """The validation loss after some steps from the start that LoftQ gives; without any, of the base alone."""
    optimizer = OptimizerConfig(lr=given.lr, warmup_steps=max(1, key["steps"] // 4))
    module = LoRAFinetuner(given.base, optimizer=optimizer, seed=key["seed"]).hold(model)
    trainer = recovery(key["steps"], [])
    if key["steps"]:
        trainer.fit(module, datamodule=data)
    with nullcontext() if key["steps"] else module.adapters_disabled():
        loss = evaluated(trainer, module, data, given.share)["loss"]
    if model.state is State.ADAPTED:
        model.detach()  # the base is as it was
    return loss


def pruned(base: str, ratio: float, data: TokenDataModule) -> CompressedModel:
    """A model with a share of its parameters taken out, as `StructuredPruning` does it by default."""
    model = CompressedModel.load(base, dtype="float32")
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
