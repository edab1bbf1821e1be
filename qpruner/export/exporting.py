"""An export from beginning to end: checked, written, measured, and moved to its destination."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpruner.dense_copy import run_data
from qpruner.errors import UserError, user_error
from qpruner.export.description import Description
from qpruner.export.fidelity import any_tokens, logit_errors, sentences
from qpruner.export.formats import exporter_for
from qpruner.export.source import Source
from qpruner.files import check_place, replacing_folder, write_json
from qpruner.pretrained import load_tokenizer

NUM_SEQUENCES, LENGTH = 8, 32
"""Sequences, and tokens in each, on which logits are compared."""
RECORD, KIND = "export.json", "qpruner export"
"""File in the export that records its results; only a folder that contains it may be overwritten."""


def export_model(
    given: Path,
    name: str,
    output: Path | None,
    dtype: str,
    options: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Exports a model, and prints its size and what the export changed.

    Args:
        given: folder of a finished run, or of its model.
        name: name of the format.
        output: folder to write; None for ``exports/NAME`` beside the folder of the model.
        dtype: number format of what is left dense: ``bfloat16``, ``float16``, or ``auto`` for bfloat16 where the model
            has that and float16 elsewhere.
        options: options specific to the format.
        overwrite: whether an existing export is replaced.

    Raises:
        UserError: there is no such model or format, the format cannot represent the model, or the output cannot be
            written.
    """
    exporter = exporter_for(name, options or {})
    model = Description.read(given)
    output = model.folder.parent / "exports" / name if output is None else output.expanduser()
    if os.path.lexists(output):
        _check_replaceable(output, overwrite=overwrite)
    check_place(output.parent)  # where it is written under another name, and then moved
    exporter.check(model)
    source = Source.read(given)
    tokens, text = text_of(source)
    with replacing_folder(output) as temporary:
        written = exporter.write(source, temporary, _dense_dtype(source, dtype))
        size = sum((temporary / file).stat().st_size for file in written.files)
        errors = logit_errors(source, written.read, tokens)
        bits = 8 * written.predicted_bytes / source.num_weights
        record = {
            "kind": KIND,
            "format": name,
            "options": {"dtype": dtype, **(options or {})},
            "weights": source.num_weights,
            "predicted_bytes": written.predicted_bytes,
            "bytes": size,
            "bits_per_weight": bits,
            "changes": list(written.changes),
            "logits": {"text": text, **asdict(errors)},
        }
        write_json(temporary / RECORD, record)
    number = len(written.files)
    print(
        f"{output} holds {source.num_weights:,} weights in {name}: {written.predicted_bytes:,} bytes of tensors were "
        f"predicted ({bits:.2f} bits per weight), {size:,} bytes are on disk in {number} file{'s' * (number > 1)}."
    )
    for change in written.changes:
        print(f"  {change}.")
    print(f"On {text}, {errors}.")


def text_of(source: Source) -> tuple[Tensor, str]:
    """Tokens on which an export is compared with its model, int64 [N, T], and a description of them."""
    data = run_data(source.folder)
    if not isinstance(data, str):
        try:
            return data.calibration(NUM_SEQUENCES, LENGTH), "text of the run's calibration"
        except Exception as error:  # there may be less text than that
            if user_error(error) is None:
                raise
    vocabulary = source.config.vocab_size
    try:
        tokenizer: Any = load_tokenizer(str(source.folder))
    except UserError:  # it has none, or one of code that nobody vouched for
        return any_tokens(vocabulary, NUM_SEQUENCES, LENGTH), "tokens of no meaning"
    return sentences(tokenizer), "a few English sentences"


def _dense_dtype(source: Source, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if source.network.dtype == torch.bfloat16 else torch.float16


def _check_replaceable(output: Path, *, overwrite: bool) -> None:
    """Makes sure that whatever exists at the output path may be replaced.

    Raises:
        UserError: overwriting was not requested, or the path holds something other than an export.
    """
    if not overwrite:
        raise UserError(f"{str(output)!r} is there already. Name another --output, or give --overwrite to replace it.")
    if output.is_symlink() or not (output / RECORD).is_file():
        raise UserError(
            f"{str(output)!r} is not overwritten: it holds no export, which has a file {RECORD}. Name another --output."
        )
