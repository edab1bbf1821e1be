"""What qpruner adds to the bare model: training, evaluation and scoring beside plain loops of transformers and PEFT.

    python benchmarks/overhead.py --base qpruner/stories
    python benchmarks/overhead.py --base path/to/a/model --rows 4 --length 256 --steps 8 --repeats 3

Both ways do the same step on the same rows, in processes of their own and in turns. A plain step is ``model(input_ids,
labels=...).loss`` with PEFT's LoRA, AdamW and clipping; a plain evaluation the same loss without gradients; plain
scoring a backward pass with the gradients of all weights. Seconds are of a step, of a batch and of all calibration
text, and do not hold the loading of anything; the peak is that of the resident set above what it was with the model
loaded.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from random_llama import run_alone

from qpruner.adapters.lora import LoRAConfig
from qpruner.calibration.text import Calibration
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.memory import read_peak, reset_peak
from qpruner.processes import Processes
from qpruner.pruning.scores import score_units
from qpruner.records.tables import markdown_table
from qpruner.training.evaluation import evaluate
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

WORK = ("training", "evaluation", "scoring")
WARM_UP = 2  # steps that are not timed
LORA = LoRAConfig(r=8, dropout=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="qpruner/stories")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs="+", choices=WORK, default=WORK)
    parser.add_argument("--only", choices=[f"{what}-{how}" for what in WORK for how in ("ours", "plain")])
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given)))
        return
    rows = []
    for what in given.work:
        runs: dict[str, list[dict[str, float]]] = {"plain": [], "ours": []}
        for _ in range(given.repeats):
            for how, results in runs.items():
                results.append(run_alone("--only", f"{what}-{how}"))
        seconds = {how: median(result["seconds"] for result in results) for how, results in runs.items()}
        above = {how: median(result["above"] for result in results) / 2**20 for how, results in runs.items()}
        tokens = runs["ours"][0]["tokens"]
        rows.append(
            [
                what,
                f"{seconds['plain']:.3f}",
                f"{seconds['ours']:.3f}",
                f"{seconds['ours'] / seconds['plain']:.2f}",
                f"{tokens / seconds['ours']:,.0f}",
                f"{above['plain']:,.0f}",
                f"{above['ours']:,.0f}",
            ]
        )
    print(f"{given.base}, {given.dtype}, {given.rows} rows of {given.length} tokens, {torch.get_num_threads()} threads")
    header = ["", "plain, s", "ours, s", "ours / plain", "tokens / s", "plain, MiB above weights", "ours, MiB"]
    print(markdown_table(header, rows))


def measure(given: argparse.Namespace) -> dict[str, float]:
    what, _, how = given.only.partition("-")
    data = StoriesDataModule(
        tokenizer=given.base,
        layout="packed",
        max_length=given.length,
        num_train=1200,
        num_choices=0,
        loader=LoaderConfig(batch_size=given.rows, eval_tokens_per_batch=given.rows * given.length),
    )
    module = LoRAFinetuner(
        given.base, dtype=given.dtype, lora=LORA, optimizer=OptimizerConfig(lr=1e-4, schedule="constant")
    )
    module.load_base()
    tokens = data.calibration(given.rows * given.steps, given.length)
    module.model(input_ids=tokens[:1, :2])  # libraries allocate what they need for themselves
    device = torch.device("cpu")
    reset_peak(device)
    before = read_peak(device)
    seconds = globals()[f"{how}_{what}"](given, module, data, tokens)
    after = read_peak(device)
    assert before is not None and after is not None
    count = tokens.numel() if what == "scoring" else given.rows * given.length
    return {"seconds": seconds, "above": after - before, "tokens": count}


class Clock(Callback):
    """Seconds of each step after the first ones."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.seconds = (time.perf_counter() - self.since) / (trainer.global_step - WARM_UP)


def ours_training(given: argparse.Namespace, module: LoRAFinetuner, data: StoriesDataModule, tokens: Any) -> float:
    clock = Clock()
    trainer = Trainer(
        accelerator="cpu", max_steps=given.steps + WARM_UP, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, gradient_clip_val=1.0, callbacks=[clock],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return clock.seconds


def plain_training(given: argparse.Namespace, module: LoRAFinetuner, data: StoriesDataModule, tokens: Any) -> float:
    import peft

    config = peft.LoraConfig(
        r=LORA.r,
        lora_alpha=LORA.alpha,
        lora_dropout=0.0,
        target_modules=LORA.target_modules,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(module.model, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batches = tokens.split(given.rows)

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, given.steps)


def ours_evaluation(given: argparse.Namespace, module: LoRAFinetuner, data: StoriesDataModule, tokens: Any) -> float:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def look(batches: int) -> float:
        since = time.perf_counter()
        evaluate(
            module.model,
            data.evaluation_loaders("test"),
            limit=batches,
            device=torch.device("cpu"),
            precision=trainer.precision_plugin,
            title="",
            progress=False,
        )
        return time.perf_counter() - since

    look(WARM_UP)
    return look(given.steps) / given.steps


def plain_evaluation(given: argparse.Namespace, module: LoRAFinetuner, data: StoriesDataModule, tokens: Any) -> float:
    model = module.model.eval()
    batches = tokens.split(given.rows)

    @torch.no_grad()
    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        float(model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss)

    return timed(step, given.steps)


def ours_scoring(given: argparse.Namespace, module: LoRAFinetuner, data: StoriesDataModule, tokens: Any) -> float:
    calibration = Calibration.share(tokens, Processes.alone(), given.rows * given.length)
    since = time.perf_counter()
    score_units(module.model, "param_first", "sum", calibration, seed=0)
    return time.perf_counter() - since


def plain_scoring(given: argparse.Namespace, module: LoRAFinetuner, data: StoriesDataModule, tokens: Any) -> float:
    model = module.model.requires_grad_(True)
    since = time.perf_counter()
    for batch in tokens.split(given.rows):
        model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
    return time.perf_counter() - since


def timed(step: Callable[[int], None], steps: int) -> float:
    """Seconds of a step."""
    for number in range(WARM_UP):
        step(number)
    since = time.perf_counter()
    for number in range(steps):
        step(number)
    return (time.perf_counter() - since) / steps


if __name__ == "__main__":
    main()
