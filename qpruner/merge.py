"""A dense 16-bit copy of a run's model, with its adapters in its weights."""

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.plugins import Precision

from qpruner.checkpoint import is_compressed, load_compressed, read_plan, save_base
from qpruner.datamodules.base import TokenDataModule
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import DENSE, UNITS
from qpruner.quantization.merging import merge_
from qpruner.runs.folder import RunFolder
from qpruner.training.evaluation import evaluate
from qpruner.training.module import LoRAFinetuner


def merge_run(run: Path, output: Path, dtype: str) -> None:
    """Merges the adapters of a run's model into a dense copy, and prints what that changed.

    Args:
        run: folder of a finished run.
        output: folder to write; it must not be there yet.
        dtype: ``bfloat16`` or ``float16``.

    Raises:
        UserError: no such run, or the folder to write is there.
    """
    folder = RunFolder(run)
    if not (is_compressed(folder.model) and folder.finished):
        raise UserError(f"{str(folder.path)!r} holds no finished run with a compressed model. Finish its fit first.")
    if output.exists():
        raise UserError(f"{str(output)!r} is there already. Name a folder that is not.")
    data, plan = run_data(folder), read_plan(folder.model)
    model = load_compressed(folder.model)
    before = measured_perplexity(model, data)
    merged = merge_(model, getattr(torch, dtype))
    plan = plan.with_precision([dict.fromkeys(UNITS, DENSE)] * len(plan.layers))
    save_base(output, merged, plan, base_name=str(run), tokenizer=data.tokenizer)
    print(f"{output} holds {num_parameters(merged):,} dense parameters in {dtype}.")
    if before is not None:
        after = measured_perplexity(merged, data)
        assert after is not None
        print(
            f"Perplexity on the test split: {before:.4f} with adapters beside their base, {after:.4f} merged "
            f"({after / before - 1:+.2%}); {data.protocol}."
        )


def run_data(folder: RunFolder) -> TokenDataModule:
    """The data module of a run, from its configuration."""
    config = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    config["data"]["init_args"]["tokenizer"] = config["model"]["base"]  # linked on the command line
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TokenDataModule, "data")
    data: TokenDataModule = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    return data


def measured_perplexity(model: Any, data: TokenDataModule) -> float | None:
    """Perplexity of a model on the test split, on the CPU or the first CUDA device; None without such a split."""
    if "test" not in data.prepared.splits:
        return None
    module = LoRAFinetuner()
    module.model = model
    results = evaluate(
        module,
        data.evaluation_loaders("test"),
        limit=1.0,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        precision=Precision(),
        title="Testing",
        progress=True,
    )
    return results["perplexity"]
