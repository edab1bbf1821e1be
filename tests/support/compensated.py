"""What a base that compensates is to be, from the dense one, by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.datamodules.base import TokenDataModule
from qpruner.plan import CompressionPlan
from qpruner.pretrained import load_model
from qpruner.processes import Processes
from qpruner.pruning.compensation import How, compensate_, places_among, shared_copy
from qpruner.pruning.surgery import narrow_

TEXT = CalibrationConfig(num_sequences=16, length=12)
"""144 tokens that decide over up to 48 channels of the tiny Llama."""

COMPENSATION: dict[str, Any] = {"compensation": "sequential", "compensation_text": TEXT}


def sliced(base: Path, plan: CompressionPlan) -> Any:
    """The weights of the base that a plan keeps, as they are."""
    model = load_model(str(base), dtype="float32", trust_remote_code=False)
    narrow_(model, [(layer.kv_groups, layer.ffn_channels) for layer in plan.layers])
    return model


def compensated(base: Path, plans: Sequence[CompressionPlan], data: TokenDataModule, how: How = "sequential") -> Any:
    """The base as it is to be after one round of pruning or several.

    Args:
        base: folder of the dense model.
        plans: plan that each round leaves.
        data: source of the text.
        how: whether what earlier layers got wrong counts.
    """
    dense = load_model(str(base), dtype="float32", trust_remote_code=False)
    model, whole = shared_copy(dense), CompressionPlan.dense(plans[0].architecture, None)
    text = Calibration.share(data.calibration(TEXT.num_sequences, TEXT.length), Processes.alone(), TEXT.batch_size)
    for before, plan in zip((whole, *plans), plans, strict=False):
        narrow_(model, places_among(before, plan))
        compensate_(model, dense, places_among(whole, plan), text, how)
    return model


def differing(one: Any, other: Any) -> set[str]:
    """The tensors in which two models of equal shapes are not the same."""
    tensors, others = one.state_dict(), other.state_dict()
    assert tensors.keys() == others.keys()
    return {name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])}
