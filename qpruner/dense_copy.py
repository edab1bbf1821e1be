"""A copy of a run's model with its adapters merged: dense in 16 bits, or packed with pooled adapters."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.plugins import Precision
from torch import nn

from qpruner.adapter_files import has_initial_adapters
from qpruner.datamodules.base import TokenDataModule
from qpruner.datamodules.rows import TextExamples
from qpruner.errors import UserError, cut, user_error
from qpruner.files import check_place, write_text
from qpruner.folder_manifest import ADAPTER, CONFIG, PLAN, REFERENCE, Step, is_compressed, read_manifest
from qpruner.memory import num_parameters, place_, tensor_bytes
from qpruner.model_folder import GENERATION, load_compressed, read_plan, save_base
from qpruner.offload import Offload, choose, offload_
from qpruner.quantization.merging import merge_
from qpruner.quantization.pooled import check_foldable, fold_
from qpruner.records.folder import RESTORE, RunFolder
from qpruner.records.manifest import Recorded
from qpruner.records.model_card import CARD, model_card
from qpruner.records.report import Summary
from qpruner.remote_code import CODE
from qpruner.schema import read_as
from qpruner.training.evaluation import evaluate


def merge_run(run: Path, output: Path, dtype: str, *, packed: bool = False) -> None:
    """Merges the adapters of a run's model into a copy without any, and prints what that changed.

    Only the run's model is needed; where its data can still be had, the perplexity is measured before and after.

    Args:
        run: folder of a finished run, or of its model.
        output: folder to write; it must not be there yet.
        dtype: ``bfloat16`` or ``float16``, of a dense copy.
        packed: whether the copy stays packed, with pooled adapters in its minima.

    Raises:
        UserError: no such run, values that are not finite, adapters that cannot be folded into minima, or the folder to
            write is there or cannot be written.
    """
    folder, output = model_folder(run.expanduser()), output.expanduser()
    check_new(output)
    model, plan = load_compressed(folder), read_plan(folder)
    check_finite(model, f"the model in {str(folder)!r}", "Train again with a lower --model.optimizer.lr.")
    if packed:
        check_foldable(model)
    data = run_data(folder)
    before = None if isinstance(data, str) else measured_perplexity(model, data)
    options: dict[str, Any] = {"packed": True} if packed else {"dtype": dtype}
    if packed:
        merged, state = fold_(model), None
        plan = plan.with_ranks([None] * len(plan.layers))
        what = f"{tensor_bytes(merged):,} bytes, packed as before"
    else:
        merged, state = merged_by_blocks(model, getattr(torch, dtype), output.parent), "merged"
        plan = plan.merged()
        what = f"{num_parameters(merged):,} dense parameters in {dtype}"
    remedy = "Merge into a dense copy: leave --packed out." if packed else "Merge with --dtype bfloat16."
    check_finite(merged, "the merged model" + ("" if packed else f" in {dtype}"), remedy)
    recipe = [*read_manifest(folder)["recipe"], Step(name="merge", options=options)]
    save_base(output, merged, plan, base_name=str(run), state=state, recipe=recipe, tokenizer=TokenizerFiles(folder))
    if (made_by := run_of(folder)) is not None and made_by.summary.exists():
        write_text(output / CARD, model_card(output, output.name, Summary.read(made_by.summary)))
    print(f"{output} holds {what}.")
    if isinstance(data, str):
        print(f"The perplexity was not measured: {data}")
    elif before is not None and (after := measured_perplexity(merged, data)) is not None:
        print(
            f"Perplexity on the test split: {before:.4f} with adapters beside their base, {after:.4f} merged "
            f"({after / before - 1:+.2%}); {data.protocol}."
        )


def merged_by_blocks(model: Any, dtype: torch.dtype, folder: Path) -> Any:
    """The result of `merge_`; its weights lie in files of a folder where they do not fit into memory."""
    model.cpu()  # where the perplexity was measured there may be room for the packed model alone
    offloads, reason = choose("auto", num_parameters(model) * dtype.itemsize, torch.device("cpu"))
    if not offloads:
        return merge_(model, dtype)
    print(reason)
    folder.mkdir(parents=True, exist_ok=True)
    offload = Offload(folder)
    merged = merge_(model, dtype, done=offload.shelve_)
    offload_(merged, offload)
    return merged


def model_folder(given: Path) -> Path:
    """The folder of the compressed model that a person means.

    Args:
        given: folder of a run, or of a model.

    Raises:
        UserError: there is none, or its fit is not over.
    """
    if not given.is_dir():
        raise UserError(f"There is no folder {str(given)!r}. Give the folder of a run, such as runs/quickstart.")
    run = RunFolder(given)
    if run.config.exists():
        return run.finished_model()
    if not is_compressed(given):
        raise UserError(f"{str(given)!r} is the folder of no run. Give one, such as runs/quickstart.")
    if has_initial_adapters(given):
        raise UserError(f"The fit of {str(given)!r} is not over. Finish it first: repeat its command.")
    return given


def check_new(folder: Path) -> None:
    """Makes sure, before the expensive work, that a folder is not there and can be written.

    Raises:
        UserError: it is there already, or cannot be written.
    """
    if os.path.lexists(folder):
        raise UserError(f"{str(folder)!r} is there already. Name a folder that is not.")
    check_place(folder)


def check_finite(model: nn.Module, what: str, remedy: str) -> None:
    """Makes sure that every number of a model is finite.

    Raises:
        UserError: some are not; the tensors are counted, and the first is named.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(f"Of {what}, {broken[0]}{others} hold values that are not finite. {remedy}")


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer's files in a compressed model's folder, which are copied but never loaded: they may contain code.

    Args:
        folder: folder of the compressed model.
    """

    folder: Path

    @property
    def names(self) -> list[str]:
        """The paths in the folder, as its manifest lists them."""
        return [name for name in read_manifest(self.folder)["files"] if not is_of_model(name)]

    def save_pretrained(self, folder: Path) -> None:
        """Copies the files to another folder."""
        for name in self.names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)


def is_of_model(name: str) -> bool:
    """Whether a file of a compressed folder is one of the model itself: widths, weights, plan or adapters."""
    weights = name.endswith((".safetensors", ".safetensors.index.json"))
    beside = name.startswith((f"{ADAPTER}/", f"{REFERENCE}/"))
    return name in (CONFIG, GENERATION, PLAN, CODE) or weights or beside


def run_of(model: Path) -> RunFolder | None:
    """The run that the folder of a model belongs to; None where it lies in none."""
    return next((run for run in map(RunFolder, model.absolute().parents[:3]) if run.config.exists()), None)


def run_data(model: Path) -> TokenDataModule | str:
    """The data module of a model's run, with its rows prepared; or a sentence that says why there is none."""
    run = run_of(model)
    if run is None:
        return f"{str(model)!r} lies in no run, whose configuration would name the data."
    try:
        config = run.read_config()
        config["data"]["init_args"]["tokenizer"] = str(model)  # linked on the command line
        config["data"]["init_args"]["trust_remote_code"] = config["model"].get("trust_remote_code", False)
        parser: Any = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(TokenDataModule, "data")
        data: TokenDataModule = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
        held = data.fingerprint().get("test")
        recorded = (
            read_as(run.manifest, Recorded, remedy=RESTORE)["data"].get("test") if run.manifest.exists() else held
        )
    except Exception as error:  # data modules may be anyone's, and a merge needs none
        said = str(user_error(error) or error)
        reason = [line for line in said.splitlines() if line.strip() and "Given value" not in line]
        return (
            f"the data of the run cannot be had from here ({cut(reason[-1] if reason else type(error).__name__)}). "
            f"Measure it where they are, such as by Run.evaluate for a run that was made from Python."
        )
    if held is None:
        return "the data of the run have no test split."
    if recorded != held:
        return "the test data that are there now are not those of the run."
    return data


def measured_perplexity(model: Any, data: TokenDataModule) -> float | None:
    """Perplexity of a model on the test split, on the first CUDA device if it has room there, else on the CPU.

    Returns:
        None where nothing is scored.
    """
    data.check_model(model.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place_(model, device)
    except UserError:  # a merge needs no GPU
        device = torch.device("cpu")
    results = evaluate(
        model,
        [loader for loader in data.evaluation_loaders("test") if isinstance(loader.examples, TextExamples)],
        limit=1.0,
        device=device,
        precision=Precision(),
        title="Testing",
        progress=True,
    )
    return results.get("perplexity")
