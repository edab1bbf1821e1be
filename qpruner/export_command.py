"""`qpruner export`: writes a run's model in the format of another engine."""

from pathlib import Path
from typing import Literal

from qpruner.options.functions import run_function


def export_command(arguments: list[str]) -> None:
    run_function("qpruner export", export, arguments)


def export(
    folder: Path,
    *,
    format: str,
    output: Path | None = None,
    dtype: Literal["auto", "bfloat16", "float16"] = "auto",
    overwrite: bool = False,
    adapters: Literal["beside", "merged"] | None = None,
    round_to: str | None = None,
    tokenizer: bool = True,
) -> None:
    """Writes a run's model in the format of another engine, and prints its size and how much its logits change.

    Formats: dense, a Hugging Face folder with all weights in 16 bits and the adapters merged into them; gguf, a file
    for llama.cpp, with the model's own codes where GGUF has a type for them; compressed-tensors, a Hugging Face folder
    with symmetric codes of 2, 4 and 8 bits, for vLLM and transformers; onnx, a graph for onnxruntime, with layers of
    any widths and the codes of any format; mlx, a folder for mlx-lm, with 2 to 8 bits and layers of any widths.

    Args:
        folder: folder of a finished run, such as runs/quickstart, or of its model.
        format: name of the format: dense, gguf, compressed-tensors, onnx or mlx.
        output: folder to write; by default exports/FORMAT beside the folder of the model.
        dtype: dtype of weights that stay dense; auto is bfloat16 if the model uses it, and float16 otherwise.
        overwrite: whether an existing export is replaced.
        adapters: only for gguf, where trained adapters go: beside, unchanged to a file of their own (the default), or
            merged into the weights, which are then rounded again.
        round_to: only for gguf, the type of packed weights whose codes fit no GGUF type, such as those of nf4: Q8_0
            (the default), Q5_1, Q5_0, Q4_1, Q4_0, F16, BF16 or F32.
        tokenizer: only for gguf, whether the tokenizer is written; without it, prompts must be token ids.

    Raises:
        UserError: there is no such model or format, the format cannot represent the model, or the output cannot be
            written.
    """
    from qpruner.export.exporting import export_model  # takes seconds to import, and --help does without

    options = {"adapters": adapters, "round_to": round_to, "tokenizer": None if tokenizer else False}
    given = {name: value for name, value in options.items() if value is not None}
    export_model(folder, format, output, dtype, given, overwrite=overwrite)
