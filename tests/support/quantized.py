"""Tiny models that a plan narrows and quantizes, and the factors that they start from."""

from typing import Any

import torch

from qpruner.anatomy import architecture_of
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import Factors, LoftQSettings
from support.families import KEPT_EXPERTS, MIXTURES, tiny_model

CPU = torch.device("cpu")

NF4, DOUBLE, INT8 = Precision("nf4", 4, 64), Precision("fp4-double", 4, 32), Precision("int8", 8)

MIXED = [
    dict(zip(UNITS, precisions, strict=True))
    for precisions in ((NF4, INT8, DENSE, NF4), (DENSE, NF4, DOUBLE, INT8), (INT8, DENSE, NF4, DOUBLE))
]

ALL = "all-linear"

WIDE = [((0, 2, 3), tuple(range(35))), ((1,), tuple(range(3, 48, 2))), ((0, 1, 2, 3), tuple(range(7)))]
"""A pruning that leaves room for rank 4 in every linear."""


def settings(**changes: Any) -> LoftQSettings:
    return LoftQSettings(**{"rank": 4, "scale": 4.0, "targets": ALL, "num_iterations": 1, "seed": 0} | changes)


def pruned(family: str, precision: Any = MIXED, kept: Any = None) -> tuple[Any, CompressionPlan]:
    model = tiny_model(family)
    kept = kept or (KEPT_EXPERTS if family in MIXTURES else WIDE)
    plan = CompressionPlan.dense(architecture_of(model.config), None).keeping(kept).with_precision(precision)
    apply_pruning_(model, plan)
    return model, plan


def equal(first: dict[str, Factors], second: dict[str, Factors]) -> bool:
    pairs = [(first[name], second[name]) for name in first.keys() | second.keys()]
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
