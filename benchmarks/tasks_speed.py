"""How fast choice tasks are evaluated, against the forward passes that they cannot do without.

    python benchmarks/tasks_speed.py --model MODEL --folder FOLDER --tasks boolq piqa

``evaluated`` is all that ``qpruner evaluate`` does for a task: it reads the questions, tokenizes them, makes trees of
the options, batches them, runs the model, picks answers and writes them. ``bare`` is the trunk of the model on the same
batches and its head on the scored positions, with every tensor and mask made before the clock starts. ``rows`` is the
same with a row for each option. The ways take turns, pass after pass, and the fastest pass of each counts; on a CPU the
clock is that of the process, whose one thread does not pay for what else the machine does.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from qpruner.datamodules.choice_tasks import read_task
from qpruner.datamodules.choices import NOTHING, ChoiceBatch, ChoiceExamples
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.questions import TASKS, find_task
from qpruner.datamodules.rows import Batch, TextExamples
from qpruner.evaluation.devices import launch
from qpruner.evaluation.evaluator import Evaluator
from qpruner.evaluation.subject import Subject
from qpruner.likelihood import IGNORED, causal_model
from qpruner.records.tables import markdown_table


@dataclass(frozen=True)
class Pass:
    """A forward pass of which everything is ready.

    Args:
        arguments: arguments of the model's trunk.
        places: rows and columns of the hidden states that predict scored tokens.
    """

    arguments: dict[str, Tensor]
    places: tuple[Tensor, ...]

    @classmethod
    def of_trees(cls, batch: ChoiceBatch, device: torch.device) -> "Pass":
        branch = batch["branch"]
        arguments = {"attention_mask": (branch != NOTHING).long()}
        if bool((branch > 0).any()):
            order = torch.arange(branch.shape[1])
            keys, queries = branch[:, None, :], branch[:, :, None]
            seen = (order[None, None, :] <= order[None, :, None]) & ((keys == 0) | (keys == queries))
            arguments = {"attention_mask": seen[:, None], "position_ids": batch["positions"]}
        scored = batch["options"] != NOTHING
        places = (scored.nonzero(as_tuple=True)[0], batch["sources"][scored])
        return cls(*move_data_to_device(({"input_ids": batch["input_ids"], **arguments}, places), device))

    @classmethod
    def of_rows(cls, batch: Batch, device: torch.device) -> "Pass":
        """The last token of an option predicts nothing, and is left out as in a tree."""
        inputs = {"input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
        places = (batch["labels"][:, 1:] != IGNORED).nonzero(as_tuple=True)
        return cls(*move_data_to_device((inputs, places), device))

    @property
    def tokens(self) -> int:
        return self.arguments["input_ids"].numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--items", type=int, default=300, help="most questions of a task")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--accelerator", default="cpu")
    given = parser.parse_args()
    subject = Subject.load(given.model, dtype=given.dtype)
    lines = [measure(given, subject, task) for task in given.tasks]
    rates = (f"{way}, items/s" for way in ("evaluated", "bare", "rows"))
    header = ["task", "items", *rates, "evaluated / bare", "rows / bare", "tokens of trees", "tokens of rows"]
    print(markdown_table(header, lines))


@torch.no_grad()
def measure(given: argparse.Namespace, subject: Subject, task: str) -> list[str]:
    """The line of a task: items per second each way, and times as a multiple of that of bare passes."""
    processes = launch(given.accelerator, 1)
    device, network = processes.device, subject.network.to(processes.device)
    kind = find_task(task)
    questions = read_task(given.folder, task, "all", given.items)
    pad = subject.tokenizer.pad_token_id or 0
    examples = ChoiceExamples.of(task, kind.measure, questions, subject.tokenizer, max_length=2048, pad_token=pad)
    trees = EvaluationLoader(examples, tokens=given.batch_tokens)
    rows = EvaluationLoader(TextExamples(examples.rows, pad), tokens=given.batch_tokens)
    passes = {
        "bare": [Pass.of_trees(batch, device) for batch in trees],  # type: ignore[arg-type]
        "rows": [Pass.of_rows(batch, device) for batch in rows],
    }

    def evaluated() -> None:
        with TemporaryDirectory() as folder:
            evaluator = Evaluator(subject, processes, Path(folder), batch_tokens=given.batch_tokens)
            questions = read_task(given.folder, task, "all", given.items)
            evaluator.task(evaluator.tokenize(task, kind.measure, questions), questions.source, "all")

    ways = {"evaluated": evaluated} | {name: partial(run, network, each) for name, each in passes.items()}
    seconds = fastest(ways, given.passes, device)
    each_way = ("evaluated", "bare", "rows")
    return [
        task,
        f"{len(examples):,}",
        *(f"{len(examples) / seconds[way]:.1f}" for way in each_way),
        *(f"{seconds[way] / seconds['bare']:.3f}" for way in ("evaluated", "rows")),
        *(f"{sum(each.tokens for each in passes[way]):,}" for way in ("bare", "rows")),
    ]


def run(network: Any, passes: list[Pass]) -> None:
    causal = causal_model(network)
    head = causal.get_output_embeddings()
    for each in passes:
        head(causal.base_model(**each.arguments, use_cache=False).last_hidden_state[each.places])


def fastest(ways: dict[str, Callable[[], None]], passes: int, device: torch.device) -> dict[str, float]:
    """Seconds of the fastest pass of each way; the ways take turns, after a pass of each that does not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = dict.fromkeys(ways, float("inf"))
    for number in range(passes + 1):
        for name, way in ways.items():
            since = clock()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                seconds[name] = min(seconds[name], clock() - since)
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
