"""`qpruner export`: a run's model in the format of another engine."""

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
    """Writes a run's model in the format of another engine, and prints its bytes and how far its logits are off.

    Formats: dense, a folder of Hugging Face with all weights in 16 bits and the adapters in them; gguf, a file for
    llama.cpp, with the model's own codes where GGUF has a type for them; compressed-tensors, a folder of Hugging Face
    with symmetric 2, 4 and 8 bits, for vLLM and transformers; onnx, a graph for onnxruntime, of any widths and with the
    codes of any format; mlx, a folder for mlx-lm, of 2 to 8 bits and of any widths.

    Args:
        folder: folder of a finished run, such as runs/quickstart, or of its model.
        format: name of the format: dense, gguf, compressed-tensors, onnx or mlx.
        output: folder to write; by default exports/FORMAT beside the folder of the model.
        dtype: number format of what is left dense; auto is bfloat16 where the model has that, and float16 elsewhere.
        overwrite: whether an output that is there already is replaced.
        adapters: of gguf, where trained adapters go: beside, as they are, to a file of their own (the default), or
            merged into the weights, which then are rounded anew.
        round_to: of gguf, the type of packed weights whose codes no type holds, such as those of nf4: Q8_0 (the
            default), Q5_1, Q5_0, Q4_1, Q4_0, F16, BF16 or F32.
        tokenizer: of gguf, whether the tokenizer is written; without it prompts are token ids.
    """
    from qpruner.export.exporting import export_model  # takes seconds to import, and help needs it not

    options = {"adapters": adapters, "round_to": round_to, "tokenizer": None if tokenizer else False}
    given = {name: value for name, value in options.items() if value is not None}
    export_model(folder, format, output, dtype, given, overwrite=overwrite)
