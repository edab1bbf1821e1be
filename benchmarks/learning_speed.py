"""What a step costs in which gates are learned, against a pass through the frozen dense model and a step of LoRA.

    python benchmarks/learning_speed.py --base MODEL --train TRAIN.jsonl
    python benchmarks/learning_speed.py --base MODEL --train TRAIN.jsonl --widths 2 4 --lifts --passes 20

All see the same batch, in turn, so that what else the machine does meets all. The plain pass is forward and backward,
with slopes down to the embeddings and none of weights; the step of LoRA trains adapters of the default rank on the
dense model. Printed are the medians, their ratios, the peak memory of a step above what is held between steps, and the
bytes that the bank of all widths takes beside the 16-bit weights of the decoder's units.
"""

import argparse
from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter

import torch
from measured import Cost
from studies import text_data

from qpruner.adapters.lora import LoRAConfig
from qpruner.compressed import CompressedModel
from qpruner.joint.config import JointConfig
from qpruner.joint.learner import Ground, PlanLearner
from qpruner.joint.network import GatedNetwork
from qpruner.joint.prior import Text
from qpruner.joint.space import JointSpace, unit_bytes
from qpruner.likelihood import IGNORED, token_nll
from qpruner.processes import Processes
from qpruner.quantization.bank import fill
from qpruner.quantization.formats import precision_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--lifts", action="store_true")
    parser.add_argument("--passes", type=int, default=10)
    given = parser.parse_args()
    given.validation = None
    data = text_data(given, seed=0)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = CompressedModel.load(given.base, dtype="auto")
    network, plan = model.network, model.known_plan()
    offered = tuple(precision_of(bits, given.group, {4: "affine-double"}) for bits in given.widths)
    space = JointSpace(plan, offered, network.dtype.itemsize, lifts=given.lifts)
    bank = fill(network, offered, None, device=torch.device("cpu"))
    gated = GatedNetwork(network, bank, space)
    print(f"{batch['input_ids'].numel()} tokens; bank {bank.num_bytes / 1e6:.1f} MB, "
          f"units in 16 bits {unit_bytes(plan, 2) / 1e6:.1f} MB")  # fmt: skip
    embeddings = network.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    limit = (space.cheapest + space.dearest) // 2

    def plain() -> None:
        with gated.unchanged():
            nll = token_nll(network, batch["input_ids"], batch["labels"], batch["attention_mask"])
            (nll.sum() / (batch["labels"] != IGNORED).sum()).backward()

    times: dict[str, list[float]] = {"plain": [], "LoRA": []}
    steps: dict[str, Callable[[], None]] = {"plain": plain, "LoRA": step_of_lora(given.base, batch)}
    for loss in ("cross_entropy", "kl"):
        times[loss], steps[loss] = [], step_of(JointConfig(loss=loss, lifts=given.lifts), gated, limit, batch)  # type: ignore[arg-type]
    for number in range(given.passes + 1):
        for name, step in steps.items():
            since = perf_counter()
            step()
            if number:  # the first warms up
                times[name].append(perf_counter() - since)
    of_plain = median(times["plain"])
    for name, seconds in times.items():
        cost = Cost()
        with cost.of_work(network):
            steps[name]()
        print(f"{name:14s} {median(seconds):7.3f} s  {median(seconds) / of_plain:5.2f} of a plain pass  "
              f"{cost.megabytes:6.0f} MB at its peak")  # fmt: skip


def step_of(config: JointConfig, gated: GatedNetwork, limit: int, batch: object) -> Callable[[], None]:
    """A step of learning, without a Trainer."""
    learner = PlanLearner(config, lambda _: (Ground(gated, Text([], 0, 0), Processes.alone()), [limit]), seed=0)
    learner.setup("fit")
    for kind in gated.space.shapes:
        getattr(learner, f"start_{kind}").normal_()
    learner.log = learner.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(learner.gates.parameters(), lr=0.01)

    def step() -> None:
        learner.training_step(batch, 0).backward()  # type: ignore[arg-type]
        learner.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of_lora(base: str, batch: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """A step of a fit of adapters on the dense model, without a Trainer."""
    model = CompressedModel.load(base, dtype="auto")
    model.attach(LoRAConfig(), seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step() -> None:
        nll = token_nll(model.network, batch["input_ids"], batch["labels"], batch["attention_mask"])
        (nll.sum() / (batch["labels"] != IGNORED).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
