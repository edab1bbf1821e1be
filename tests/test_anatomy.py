from typing import Any

import pytest
import torch
from support.families import FFN, HIDDEN, KEPT, LAYERS, PLAIN, tiny_config, tiny_model
from transformers import GPTNeoXConfig

from qpruner.anatomy import (
    FAMILIES,
    architecture_of,
    decoder_layers,
    family_of,
    head_shape,
    num_linear_parameters,
    unit_linears,
    unit_parameters,
    unit_shapes,
)
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import Architecture
from qpruner.pruning.surgery import narrow_

HEAD_DIMS = {family: 8 if family == "qwen2" else 16 for family in PLAIN}
QUERIES = {family: 1 if family == "gpt2" else 2 for family in PLAIN}
SEPARATE = [family for family in PLAIN if family not in ("phi3", "gpt2")]


def test_these_families_are_known() -> None:
    assert list(FAMILIES) == [
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3", "olmo2"),
        *("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phi3", "gpt2"),
    ]


@pytest.mark.parametrize("family", SEPARATE)
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


def test_stacked_projections_are_blocks_of_rows() -> None:
    # 8 query heads on 4 key-value heads of 16 channels; 48 FFN channels.
    phi3, gpt2 = decoder_layers(tiny_model("phi3"))[1], decoder_layers(tiny_model("gpt2"))[1]
    assert list(phi3.linears) == ["q_k_v", "o", "gate_up", "down"]
    assert [(c.name, c.axis, c.width, c.block.start, c.block.stop) for c in phi3.group_weights] == [
        *(("q", 0, 32, 0, 128), ("k", 0, 16, 128, 192), ("v", 0, 16, 192, 256), ("o", 1, 32, 0, 128))
    ]
    assert [(c.name, c.axis, c.width, c.block.start, c.block.stop) for c in phi3.channel_weights] == [
        *(("gate", 0, 1, 0, 48), ("up", 0, 1, 48, 96), ("down", 1, 1, 0, 48))
    ]
    assert phi3.group_weights[1].places([2, 0]).tolist() == [*range(160, 176), *range(128, 144)]
    assert list(gpt2.linears) == ["q_k_v", "o", "up", "down"] and gpt2.gate is None
    assert [(c.name, c.width, c.block.start) for c in gpt2.group_weights] == [
        *(("q", 16, 0), ("k", 16, 64), ("v", 16, 128), ("o", 16, 0))
    ]
    assert [c.name for c in gpt2.channel_weights] == ["up", "down"]


def test_linears_of_units_where_projections_are_stacked() -> None:
    assert unit_linears(tiny_model("phi3"))[2] == {
        "qkv": ("model.layers.2.self_attn.qkv_proj",),
        "o": ("model.layers.2.self_attn.o_proj",),
        "gate_up": ("model.layers.2.mlp.gate_up_proj",),
        "down": ("model.layers.2.mlp.down_proj",),
    }
    assert unit_linears(tiny_model("gpt2"))[0] == {
        "qkv": ("transformer.h.0.attn.c_attn",),
        "o": ("transformer.h.0.attn.c_proj",),
        "gate_up": ("transformer.h.0.mlp.c_fc",),
        "down": ("transformer.h.0.mlp.c_proj",),
    }


@pytest.mark.parametrize("family", PLAIN)
def test_shapes_of_units_are_those_of_their_linears(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT)
    for number, units in enumerate(unit_linears(model)):
        shapes = {
            unit: tuple(tuple(model.get_submodule(name).weight.shape) for name in names)
            for unit, names in units.items()
        }
        assert unit_shapes(architecture_of(model.config), number) == shapes


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("groups", [8, 4, 1])
def test_heads_and_channels_are_counted(family: str, groups: int) -> None:
    model = tiny_model(family, num_key_value_heads=groups)
    head_dim, queries = (64 // groups, 1) if family == "gpt2" else (HEAD_DIMS[family], 8 // groups)
    for layer in decoder_layers(model):
        assert (layer.kv_groups, layer.ffn_channels) == (groups, FFN)
        assert (layer.head_dim, layer.queries_per_group) == (head_dim, queries)
        assert [c.num_units for c in layer.group_weights] == [groups] * 4
        assert {c.num_units for c in layer.channel_weights} == {FFN}
    expected = Architecture(family, HIDDEN, head_dim, queries, (groups,) * LAYERS, (FFN,) * LAYERS)
    assert architecture_of(model.config) == expected


@pytest.mark.parametrize("family", PLAIN)
def test_only_qwen2_and_gpt2_have_biases_here(family: str) -> None:
    biased = {name for name, linear in decoder_layers(tiny_model(family))[0].linears.items() if linear.bias is not None}
    assert biased == {"qwen2": {"q", "k", "v"}, "gpt2": {"q_k_v", "o", "up", "down"}}.get(family, set())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in PLAIN),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("granite", {"attention_bias": True, "mlp_bias": True}),
        ("smollm3", {"attention_bias": True, "mlp_bias": True}),
        ("olmo2", {"attention_bias": True}),
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
    norms = sum(norm.of.width for norm in decoder_layers(model)[1].wide_norms)
    assert (total - num_parameters(model), linears - num_linear_parameters(model)) == (of_group, of_group - norms)
    narrow_(model, [whole, (range(groups - 1), range(channels - 1)), whole])
    removed = total - num_parameters(model), linears - num_linear_parameters(model)
    assert removed == (of_group + of_channel, of_group + of_channel - norms)


def test_parameters_by_hand() -> None:
    # A group of Llama: 2 query heads and a key and a value head of 16 rows, and 32 columns of o; all 64 long.
    assert unit_parameters(decoder_layers(tiny_model("llama"))[0]) == ((32 + 16 + 16 + 32) * 64, 3 * 64)
    # The same in Qwen2 with heads of 8, and with a bias for each of its rows of q, k and v.
    assert unit_parameters(decoder_layers(tiny_model("qwen2"))[0]) == ((16 + 8 + 8 + 16) * 64 + 16 + 8 + 8, 3 * 64)
    # OLMo2 has norms over 8 query heads and 4 key heads; GPT-2 one query head, no gate, and biases of all rows.
    assert unit_parameters(decoder_layers(tiny_model("olmo2"))[0]) == (96 * 64 + 32 + 16, 3 * 64)
    assert unit_parameters(decoder_layers(tiny_model("phi3"))[0]) == (96 * 64, 3 * 64)
    assert unit_parameters(decoder_layers(tiny_model("gpt2"))[0]) == (4 * 16 * 64 + 3 * 16, 2 * 64 + 1)
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


@pytest.mark.parametrize("family", PLAIN)
def test_the_shape_of_a_head_survives_pruning(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT)
    assert head_shape(model.config) == (HEAD_DIMS[family], QUERIES[family])
    assert architecture_of(model.config) == Architecture(
        family, HIDDEN, *head_shape(model.config), (3, 1, 4), (37, 23, 1)
    )
    assert [(layer.kv_groups, layer.ffn_channels) for layer in decoder_layers(model)] == [(3, 37), (1, 23), (4, 1)]


def test_a_head_is_the_hidden_size_over_the_heads_where_nothing_else_is_said() -> None:
    assert head_shape(tiny_config("llama", head_dim=None)) == (8, 2)
    assert head_shape(tiny_config("qwen2")) == (8, 2)
    assert head_shape(tiny_config("qwen2", head_dim=16)) == (16, 2)


@pytest.mark.parametrize("family", PLAIN)
def test_a_narrowed_model_is_of_its_family(family: str) -> None:
    model = tiny_model(family)
    narrow_(model, KEPT)
    assert model.config.model_type == f"compressed_{family}"
    assert family_of(model.config) == (family, FAMILIES[family])


def test_an_unsupported_family_is_refused() -> None:
    message = (
        "^Models of type 'gpt_neox' cannot be pruned; llama, mistral, qwen2, .*, phi3, gpt2 can. "
        r"A family is added in qpruner/anatomy/families\.py\.$"
    )
    for refused in (family_of, architecture_of):
        with pytest.raises(UserError, match=message):
            refused(GPTNeoXConfig())
    model = torch.nn.Linear(2, 2)
    model.config = GPTNeoXConfig()  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        decoder_layers(model)
