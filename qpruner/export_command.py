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
    dtype: Literal["bfloat16", "float16"] = "bfloat16",
    overwrite: bool = False,
) -> None:
    """Writes a run's model in the format of another engine, and prints its bytes and how far its logits are off.

    Args:
        folder: folder of a finished run, such as runs/quickstart, or of its model.
        format: dense: Hugging Face folder of 16 bits with the adapters in its weights. compressed-tensors: Hugging Face
            folder of symmetric 2, 4 and 8 bits, for vLLM and transformers. onnx: graph for onnxruntime, of any widths,
            with the codes of any format. mlx: folder for mlx-lm, of 2 to 8 bits and, as OpenELM, of any widths.
        output: folder to write; by default exports/FORMAT beside the folder of the model.
        dtype: number format of what is left dense.
        overwrite: whether an output that is there already is replaced.
    """
    from qpruner.export.exporting import export_model  # takes seconds to import, and help needs it not

    export_model(folder, format, output, dtype, overwrite=overwrite)
