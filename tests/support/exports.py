"""Folders of tiny compressed models, as exports read them."""

from pathlib import Path
from typing import Any

from qpruner.adapter_files import save_adapters
from qpruner.anatomy import architecture_of
from qpruner.export.source import Source
from qpruner.model_folder import save_base
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import quantize_
from support.families import adapted, tiny_model
from support.quantized import CPU


def source_of(
    folder: Path,
    family: str = "llama",
    *,
    kept: Any = None,
    precision: Any = DENSE,
    embedding: Precision = DENSE,
    head: Precision | None = None,
    lora: dict[str, Any] | None = None,
    tokenizer: Any = None,
    **changes: Any,
) -> Source:
    """A tiny model of a family that was narrowed, quantized, adapted, saved and read again.

    Args:
        folder: folder to write.
        family: name of the family.
        kept: [layers], KV groups and FFN channels that stay; all of them without it.
        precision: precision of all units, or of each unit of each layer.
        embedding: precision of the embedding.
        head: precision of the head; that of the embedding without it.
        lora: options of the adapters; None for none.
        tokenizer: tokenizer to write beside the model.
        **changes: changes to the configuration of the family's tiny model.
    """
    model = tiny_model(family, **changes)
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    if kept is not None:
        plan = plan.keeping(kept)
        apply_pruning_(model, plan)
    if isinstance(precision, Precision):
        precision = [dict.fromkeys(UNITS, precision)] * len(plan.layers)
    head = embedding if head is None else head
    plan = plan.with_precision(precision, embedding=embedding, head=head)
    if plan.quantized:
        quantize_(model, plan, None, device=CPU)
    save_base(folder, model, plan, base_name="tiny", tokenizer=tokenizer)
    if lora is not None:
        save_adapters(folder, adapted(model, **lora), trained=True)
    return Source.read(folder)
