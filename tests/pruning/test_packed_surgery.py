"""Packed linears keep some of their rows or columns, exactly where their scales allow it."""

from typing import Any

import pytest
import torch
from support.families import KEPT, PLAIN, logits_of, packed, tiny_model
from torch import nn

from qpruner.anatomy import architecture_of, by_linear, decoder_layers
from qpruner.plan import Precision
from qpruner.pruning.surgery import narrow_, places_of, stated_by_weights
from qpruner.quantization.formats import dequantize, quantize
from qpruner.quantization.packed import PackedLinear

INT8, NF4, DOUBLE = Precision("int8", 8), Precision("nf4", 4), Precision("nf4-double", 4)
ROWS = Precision("affine-double", 3, -1)
BIASED: dict[str, Any] = {"attention_bias": True, "mlp_bias": True}
PRUNED = [f"{layer}.{name}" for layer in (0, 1, 2) for name in ("q", "k", "v", "o", "gate", "up", "down")]
PRUNED = [name for name in PRUNED if name not in ("2.q", "2.k", "2.v", "2.o")]
"""By `KEPT`, whose last layer keeps all its groups."""


def slices(model: Any) -> dict[str, torch.Tensor]:
    """What should be left of each weight."""
    found = {}
    for number, (layer, places) in enumerate(zip(decoder_layers(model), KEPT, strict=True)):
        for parts, units in zip((layer.group_weights, layer.channel_weights), places, strict=True):
            for stack in by_linear(parts):
                weight = dequantize(stack[0].linear)  # type: ignore[arg-type]
                name = "_".join(part.name for part in stack)
                found[f"{number}.{name}"] = weight.index_select(stack[0].axis, places_of(stack, units))
    return found


def linears(model: Any) -> dict[str, Any]:
    return {f"{n}.{name}": one for n, layer in enumerate(decoder_layers(model)) for name, one in layer.linears.items()}


def rounded_anew(weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return dequantize(quantize(linear, precision))


@pytest.mark.parametrize("precision", [INT8, ROWS], ids=str)
@pytest.mark.parametrize(("family", "changes"), [*((family, {}) for family in PLAIN), ("llama", BIASED)])
def test_scales_of_whole_rows_keep_exactly_what_they_had(
    family: str, changes: dict[str, Any], precision: Precision
) -> None:
    model = packed(tiny_model(family, **changes), precision)
    expected = slices(model)
    assert narrow_(model, KEPT) == {}
    for name, linear in linears(model).items():
        assert isinstance(linear, PackedLinear) and linear.precision == precision
        assert (linear.out_features, linear.in_features) == tuple(expected[name].shape)
        assert torch.equal(dequantize(linear), expected[name])
    assert stated_by_weights(model) == architecture_of(model.config)


@pytest.mark.parametrize("precision", [NF4, DOUBLE], ids=str)
def test_four_bits_round_anew_what_is_left(precision: Precision) -> None:
    model = packed(tiny_model("llama"), precision)
    expected = slices(model)
    rounded = narrow_(model, KEPT)
    for name, linear in linears(model).items():
        assert isinstance(linear, PackedLinear) and linear.precision == precision
        held, before = dequantize(linear), expected[name]
        if name in PRUNED:
            assert torch.equal(held, rounded_anew(before, precision))
            change = float(((held - before) ** 2).sum().sqrt() / (before**2).sum().sqrt())
            assert rounded.get(name, 0.0) == pytest.approx(change, rel=1e-5)
        else:
            assert torch.equal(held, before) and name not in rounded
    of_columns = {name for name in PRUNED if name.endswith((".o", ".down"))}
    if precision == NF4:  # rows of 64 are whole groups of 64
        assert set(rounded) == of_columns
    else:
        assert of_columns < set(rounded)
        assert all(rounded[name] < 0.02 for name in set(rounded) - of_columns)
    assert all(0 < rounded[name] < 0.12 for name in of_columns)


@pytest.mark.parametrize(
    ("family", "precision"), [*((family, INT8) for family in PLAIN), ("llama", NF4), ("phi3", NF4)], ids=str
)
def test_the_change_can_be_heard_in_the_logits_only_where_there_is_one(family: str, precision: Precision) -> None:
    """Against a dense model of the slices."""
    model, dense = packed(tiny_model(family), precision), tiny_model(family)
    for name, linear in linears(dense).items():
        linear.weight.data = dequantize(linears(model)[name])
    rounded = narrow_(model, KEPT)
    narrow_(dense, KEPT)
    difference = float((logits_of(model) - logits_of(dense)).abs().max())
    assert difference < 1e-4 if not rounded else difference > 1e-3


@pytest.mark.parametrize("precision", [INT8, NF4, DOUBLE], ids=str)
def test_biases_go_with_rows_and_stay_with_columns(precision: Precision) -> None:
    model = packed(tiny_model("llama", **BIASED), precision)
    before = {name: linear.bias.clone() for name, linear in linears(model).items()}
    narrow_(model, KEPT)
    for number, (layer, places) in enumerate(zip(decoder_layers(model), KEPT, strict=True)):
        for parts, units in zip((layer.group_weights, layer.channel_weights), places, strict=True):
            for part in parts:
                bias = before[f"{number}.{part.name}"]
                rows = [unit * part.width + i for unit in units for i in range(part.width)]
                assert torch.equal(part.linear.bias, bias[rows] if part.axis == 0 else bias)
                assert not part.linear.bias.requires_grad


def test_linears_of_several_precisions_are_narrowed_each_in_its_own() -> None:
    """Int8 attention below a dense feed-forward network."""
    model = tiny_model("qwen2")
    dense = {name: linear.weight.clone() for name, linear in linears(model).items()}
    for block in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(block.self_attn, name, quantize(getattr(block.self_attn, name), INT8))
    assert narrow_(model, KEPT) == {}
    for number, (layer, (_, channels)) in enumerate(zip(decoder_layers(model), KEPT, strict=True)):
        assert isinstance(layer.q, PackedLinear) and not isinstance(layer.up, PackedLinear)
        assert torch.equal(layer.down.weight, dense[f"{number}.down"][:, list(channels)])
