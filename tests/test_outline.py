"""Shapes without transformers' model classes are those of its models."""

from typing import Any

import pytest
from support.families import KEPT, KEPT_EXPERTS, MIXTURES, tiny_config, tiny_model
from torch import nn

from qpruner.anatomy import FAMILIES
from qpruner.memory import num_parameters, tensor_bytes
from qpruner.outline import outline_of
from qpruner.pruning.surgery import narrow_


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}],
)
def test_outline_has_the_parameters_of_the_model(family: str, changes: dict[str, Any]) -> None:
    model, outline = tiny_model(family, **changes), outline_of(tiny_config(family, **changes))
    assert shapes(outline) == shapes(model)
    assert num_parameters(outline) == num_parameters(model) and tensor_bytes(outline) == tensor_bytes(model)
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_outline_of_layers_that_differ(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT_EXPERTS if family in MIXTURES else KEPT)
    assert shapes(outline_of(model.config)) == shapes(model)
