"""What resumable studies of a model on text have in common."""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import lightning as L

from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import StructuredPruning
from qpruner.datamodules import StoriesDataModule, TextDataModule
from qpruner.datamodules.base import LoaderConfig, TokenDataModule
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.rows import TextExamples, TokenRows
from qpruner.datamodules.sources import Source
from qpruner.files import hash_file
from qpruner.pretrained import EMBEDDED, model_fingerprint
from qpruner.pruning.selection import SelectionConfig
from qpruner.training.evaluation import evaluate
from qpruner.training.module import LoRAFinetuner

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser, *, steps: int) -> None:
    parser.add_argument("--base", required=True)
    parser.add_argument("--train", help="text; without it, the embedded stories")
    parser.add_argument("--validation", help="text; without it, the embedded stories")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps of the recovery")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines; what is there is not computed again")
    parser.add_argument("--table", action="store_true", help="print the rows that are there and stop")
    parser.add_argument("--part", help="such as 3/8: measure the third eighth of the rows, into rows.3-of-8.jsonl")


def name_of(base: str) -> str:
    """What rows call a base: the last part of its name, of the embedded model with the beginning of its fingerprint.

    That model changes with the package; a row says which one it was.
    """
    name = Path(base).name
    return f"{name}-{(model_fingerprint(base) or '')[:8]}" if base == EMBEDDED else name


def complete(given: argparse.Namespace, keys: Sequence[Row], measure: Callable[[Row], Row]) -> list[Row]:
    """The rows of the file, after those that it lacks were measured and added, one by one.

    With ``--part`` those of a part are measured, and added to a file of its own, for others to work on the rest. A row
    says which text it is from; those that do not are from before rows did, and count for any.
    """
    target: Path = given.rows
    if getattr(given, "part", None):
        number, count = map(int, given.part.split("/"))
        target = target.with_suffix(f".{number}-of-{count}{target.suffix}")
        keys = keys[number - 1 :: count]
    files = [path for path in dict.fromkeys((given.rows, target)) if path.exists()]
    rows: list[Row] = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    if given.table:
        return rows
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    text = {"train": text_of(given.train)}
    for key in [key | text for key in keys]:
        if not any(key.items() <= (text | row).items() for row in rows):
            rows.append(key | measure(key))
            with target.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    return rows


def text_of(spec: str | None) -> str:
    """What rows call a text: its name, with the beginning of its hash; without one, the embedded stories."""
    if spec is None:
        return "stories"
    path = Path(spec)
    return f"{path.name}-{(hash_file(path) if path.is_file() else Source(spec, 'train').fingerprint())[:8]}"


def uncompensated(ratio: float, **changes: Any) -> StructuredPruning:
    """Pruning as LLM-Pruner does it: Taylor scores on a little text, the same share of every layer, slices alone."""
    options: dict[str, Any] = {
        "criterion": "param_first",
        "selection": SelectionConfig(scope="local"),
        "calibration": CalibrationConfig(10, 64),
        "compensation": "none",
    }
    return StructuredPruning(ratio, **options | changes)


def text_data(given: argparse.Namespace, seed: int) -> TextDataModule:
    return TextDataModule(
        tokenizer=given.base,
        train=given.train,
        validation=given.validation,
        test=getattr(given, "test", None),
        held_out=0.0,
        layout="packed",
        max_length=given.max_length,
        loader=LoaderConfig(batch_size=getattr(given, "batch_size", 16)),
        seed=seed,
    )


def study_data(given: argparse.Namespace, seed: int) -> TokenDataModule:
    """The text that was given, or the embedded stories."""
    if given.train:
        return text_data(given, seed)
    loader = LoaderConfig(batch_size=getattr(given, "batch_size", 16))
    return StoriesDataModule(
        tokenizer=given.base, num_train=2400, num_validation=1000, num_choices=0, loader=loader, seed=seed
    )


def recovery(steps: int, callbacks: Sequence[L.Callback], folder: str | None = None, **options: Any) -> L.Trainer:
    """A Trainer that fits and leaves nothing behind but the compressed base; without a folder, in a temporary one."""
    return L.Trainer(
        default_root_dir=folder or gettempdir(),
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **options,
    )


def perplexity(trainer: L.Trainer, module: L.LightningModule, data: TextDataModule, share: float = 1.0) -> float:
    return evaluated(trainer, module, data, share)["perplexity"]


def evaluated(trainer: L.Trainer, module: L.LightningModule, data: TokenDataModule, share: float) -> dict[str, float]:
    """Loss and perplexity on a share of the rows of the validation split, from its start."""
    number = max(1, int(share * len(data.examples("validation"))))
    return evaluated_on(trainer, module, data, number)


def evaluated_on(trainer: L.Trainer, module: L.LightningModule, data: TokenDataModule, number: int) -> dict[str, float]:
    """Loss and perplexity on the first rows of the validation split."""
    assert isinstance(module, LoRAFinetuner)
    rows = data.examples("validation").rows
    end = int(rows.offsets[number])
    first = TokenRows(rows.tokens[:end], rows.scored[:end], rows.num_bytes[:end], rows.offsets[: number + 1])
    return evaluate(
        module.model,
        [EvaluationLoader(TextExamples(first, data.pad_token), tokens=data.loader.eval_tokens_per_batch)],
        limit=1.0,
        device=trainer.strategy.root_device,
        precision=trainer.precision_plugin,
        title="",
        progress=False,
    )
