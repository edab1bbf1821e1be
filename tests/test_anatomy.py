from typing import Any

import pytest
import torch
from families import FFN, HIDDEN, KEPT, LAYERS, tiny_config, tiny_model
from transformers import GPT2Config

from qpruner.anatomy import (
    FAMILIES,
    architecture_of,
    decoder_layers,
    family_of,
    head_shape,
    num_linear_parameters,
    unit_parameters,
)
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import Architecture
from qpruner.pruning.surgery import narrow_

HEAD_DIMS = {family: 8 if family == "qwen2" else 16 for family in FAMILIES}


def test_these_families_are_known() -> None:
    assert list(FAMILIES) == ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projections_are_the_models_own(family: str) -> None:
    model = tiny_model(family)
    layers = decoder_layers(model)
    assert len(layers) == LAYERS
    for layer, found in zip(model.model.layers, layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        expected = {
            "q": attention.q_proj,
            "k": attention.k_proj,
            "v": attention.v_proj,
            "o": attention.o_proj,
            "gate": mlp.gate_proj,
            "up": mlp.up_proj,
            "down": mlp.down_proj,
        }
        assert list(found.linears) == list(expected)
        assert all(found.linears[name] is linear for name, linear in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("groups", [8, 4, 1])
def test_heads_and_channels_are_counted(family: str, groups: int) -> None:
    model = tiny_model(family, num_key_value_heads=groups)
    for layer in decoder_layers(model):
        assert (layer.kv_groups, layer.ffn_channels) == (groups, FFN)
        assert (layer.head_dim, layer.queries_per_group) == (HEAD_DIMS[family], 8 // groups)
        assert [c.num_units for c in layer.group_weights] == [groups] * 4
        assert [c.num_units for c in layer.channel_weights] == [FFN] * 3
    expected = Architecture(family, HIDDEN, HEAD_DIMS[family], 8 // groups, (groups,) * LAYERS, (FFN,) * LAYERS)
    assert architecture_of(model.config) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_only_qwen2_has_biases_here(family: str) -> None:
    biased = {name for name, linear in decoder_layers(tiny_model(family))[0].linears.items() if linear.bias is not None}
    assert biased == ({"q", "k", "v"} if family == "qwen2" else set())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True, "num_key_value_heads": 8}),
        ("gemma", {"num_key_value_heads": 2}),
    ],
)
def test_one_unit_removed_takes_its_parameters(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    groups, channels = decoder_layers(model)[1].kv_groups, FFN
    of_group, of_channel = unit_parameters(decoder_layers(model)[1])
    total, linears = num_parameters(model), num_linear_parameters(model)
    whole = (range(groups), range(channels))
    narrow_(model, [whole, (range(1, groups), range(channels)), whole])
    assert (total - num_parameters(model), linears - num_linear_parameters(model)) == (of_group, of_group)
    narrow_(model, [whole, (range(groups - 1), range(channels - 1)), whole])
    assert (total - num_parameters(model), linears - num_linear_parameters(model)) == (of_group + of_channel,) * 2


def test_parameters_by_hand() -> None:
    # A group of Llama: 2 query heads and a key and a value head of 16 rows, and 32 columns of o; all 64 long.
    assert unit_parameters(decoder_layers(tiny_model("llama"))[0]) == ((32 + 16 + 16 + 32) * 64, 3 * 64)
    # The same in Qwen2 with heads of 8, and with a bias for each of its rows of q, k and v.
    assert unit_parameters(decoder_layers(tiny_model("qwen2"))[0]) == ((16 + 8 + 8 + 16) * 64 + 16 + 8 + 8, 3 * 64)
    # All biases of Llama: those of o and down stay when a unit goes.
    biased = tiny_model("llama", attention_bias=True, mlp_bias=True)
    assert unit_parameters(decoder_layers(biased)[0]) == (96 * 64 + 32 + 16 + 16, 3 * 64 + 2)
    assert num_linear_parameters(biased) == 3 * (4 * (96 * 64 + 64) + 48 * (3 * 64 + 2) + 64 + 64)
    assert num_linear_parameters(tiny_model("llama")) == 3 * (4 * 96 * 64 + 48 * 3 * 64)
    assert num_linear_parameters(tiny_model("qwen2")) == 3 * (4 * (48 * 64 + 32) + 48 * 3 * 64)


def test_values_are_gathered_by_unit() -> None:
    layer = decoder_layers(tiny_model("qwen2"))[0]
    q, k, _, o = layer.group_weights
    assert torch.equal(q.by_unit(q.linear.weight)[2], layer.q.weight[32:48])
    assert torch.equal(q.by_unit(q.linear.bias)[2], layer.q.bias[32:48])
    assert torch.equal(k.by_unit(k.linear.weight)[3], layer.k.weight[24:32])
    assert torch.equal(o.by_unit(o.linear.weight)[1], layer.o.weight[:, 16:32].T)
    gate, _, down = layer.channel_weights
    assert torch.equal(gate.by_unit(gate.linear.weight)[7], layer.gate.weight[7:8])
    assert torch.equal(down.by_unit(down.linear.weight)[7], layer.down.weight[:, 7:8].T)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_of_a_head_survives_pruning(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT)
    assert head_shape(model.config) == (HEAD_DIMS[family], 2)
    assert architecture_of(model.config) == Architecture(family, HIDDEN, HEAD_DIMS[family], 2, (3, 1, 4), (37, 23, 1))
    assert [(layer.kv_groups, layer.ffn_channels) for layer in decoder_layers(model)] == [(3, 37), (1, 23), (4, 1)]


def test_a_head_is_the_hidden_size_over_the_heads_where_nothing_else_is_said() -> None:
    assert head_shape(tiny_config("llama", head_dim=None)) == (8, 2)
    assert head_shape(tiny_config("qwen2")) == (8, 2)
    assert head_shape(tiny_config("qwen2", head_dim=16)) == (16, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrowed_model_is_of_its_family(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT)
    assert model.config.model_type == f"compressed_{family}"
    assert family_of(model.config) == (family, FAMILIES[family])


def test_an_unsupported_family_is_refused() -> None:
    message = (
        "^Models of type 'gpt2' cannot be pruned; llama, mistral, qwen2, qwen3, gemma, gemma2 can. "
        r"A family is added in qpruner/anatomy\.py\.$"
    )
    for refused in (family_of, architecture_of):
        with pytest.raises(UserError, match=message):
            refused(GPT2Config())
    model = torch.nn.Linear(2, 2)
    model.config = GPT2Config()  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        decoder_layers(model)
