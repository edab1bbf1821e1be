import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.families import HIDDEN, KEPT, PLAIN, logits_of, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from qpruner.anatomy import FAMILIES, architecture_of
from qpruner.model_folder import build_skeleton, save_base
from qpruner.modeling_compressed import layer_config
from qpruner.plan import CompressionPlan
from qpruner.pruning.surgery import apply_pruning_, narrow_
from qpruner.pruning.widths import compressed_config_class, plain_dict, portable_config, with_widths

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDTHS = {
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "head_dim",
    "per_layer_config",
    "n_head",
    "n_inner",
}


def uniform(family: str, groups: int, **changes: Any) -> Any:
    """A model of which every layer keeps so many KV groups, with 2 query heads each, and 40 channels."""
    model = tiny_model(family, **changes)
    narrow_(model, [(range(1, groups + 1), range(40))] * 3)
    return model


def saved(folder: Path, family: str, kept: Any, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A pruned model that `save_base` wrote, and its config.json."""
    model = tiny_model(family, **changes)
    plan = CompressionPlan.dense(architecture_of(model.config), None).keeping(kept)
    apply_pruning_(model, plan)
    save_base(folder, model, plan, base_name="dense", tokenizer=None)
    return model, json.loads((folder / "config.json").read_text())


THREE, TWO = [((0, 1, 3), range(40))] * 3, [((0, 3), range(40))] * 3
"""Uniform: 6 and 4 heads of 16, where only 4 divides the hidden size of 64."""


@pytest.mark.parametrize(
    ("family", "kept", "model_type"),
    [
        ("llama", THREE, "mistral"),
        ("llama", TWO, "llama"),
        *(
            (family, kept, family)
            for family in ("mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "olmo2", "phi3")
            for kept in (THREE, TWO)
        ),
        ("gemma2", TWO, "gemma2"),
        ("gemma3_text", TWO, "gemma3_text"),
        ("gpt2", [(range(4), range(40))] * 3, "gpt2"),
    ],
)
def test_transformers_alone_loads_equal_layers(tmp_path: Path, family: str, kept: Any, model_type: str) -> None:
    model, content = saved(tmp_path / "model", family, kept)
    assert content["model_type"] == model_type
    assert content["architectures"] == [FAMILIES[model_type].model_class]
    assert "per_layer_config" not in content
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(stock) is getattr(transformers, FAMILIES[model_type].model_class)
    assert torch.equal(logits_of(stock), logits_of(model))


def test_a_llama_as_mistral_has_no_sliding_window_and_its_own_positions(tmp_path: Path) -> None:
    model, content = saved(tmp_path / "model", "llama", THREE, rope_parameters=LLAMA3, tie_word_embeddings=True)
    assert content["model_type"] == "mistral"
    assert content["sliding_window"] is None
    assert content["rope_parameters"] == LLAMA3
    tokens = torch.arange(5, 65)[None]  # past the original 32 positions
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(stock, tokens), logits_of(model, tokens))
    assert stock.lm_head.weight is stock.model.embed_tokens.weight


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_a_llama_with_biases_is_no_mistral(biases: dict[str, bool]) -> None:
    model = uniform("llama", 3, **biases)
    assert portable_config(model.config) is model.config
    assert model.config.model_type == "compressed_llama"
    assert portable_config(uniform("llama", 2, **biases).config).model_type == "llama"


def test_a_gemma2_that_does_not_divide_stays_a_type_of_ours(tmp_path: Path) -> None:
    _, content = saved(tmp_path / "model", "gemma2", THREE)
    assert content["model_type"] == "compressed_gemma2"
    assert content["architectures"] == ["CompressedGemma2ForCausalLM"]
    assert (content["num_attention_heads"], content["num_key_value_heads"], content["head_dim"]) == (6, 3, 16)


@pytest.mark.parametrize("family", PLAIN)
def test_a_dense_model_stays_what_it_is(family: str) -> None:
    config = tiny_config(family)
    same = portable_config(with_widths(config, architecture_of(config)))
    assert type(same) is type(config)
    expected, found = config.to_dict(), same.to_dict()
    if family in ("qwen2", "gpt2"):
        assert found.pop("head_dim") == {"qwen2": 8, "gpt2": 16}[family]  # now said
    assert found == expected


@pytest.mark.parametrize("family", PLAIN)
def test_unequal_layers_stand_in_per_layer_config(tmp_path: Path, family: str) -> None:
    model, content = saved(tmp_path / "model", family, KEPT)
    assert content["model_type"] == f"compressed_{family}"
    assert content["architectures"] == [f"Compressed{FAMILIES[family].model_class}"]
    names = ["num_attention_heads", "num_key_value_heads", "intermediate_size"]
    dense, layers = (8, 4, 48), [(6, 3, 37), (2, 1, 23), (8, 4, 1)]
    if family == "gpt2":
        names, dense, layers = ["n_head", "n_inner"], (4, 48), [(3, 37), (1, 23), (4, 1)]
    usual = {name: content[name] for name in names}
    assert usual == dict(zip(names, dense, strict=True))  # of the dense model
    found = [usual | content["per_layer_config"].get(str(number), {}) for number in range(3)]
    assert found == [dict(zip(names, widths, strict=True)) for widths in layers]
    assert portable_config(model.config) is model.config


def test_unequal_channels_alone_make_layers_unequal() -> None:
    config = tiny_config("llama")
    widths = replace(architecture_of(config), ffn_channels=(48, 48, 47))
    made = with_widths(config, widths)
    assert made.is_heterogeneous and architecture_of(made) == widths


@pytest.mark.parametrize("family", PLAIN)
def test_layers_that_become_equal_stand_in_the_usual_fields(family: str) -> None:
    unequal = with_widths(tiny_config(family), replace(architecture_of(tiny_config(family)), kv_groups=(4, 3, 2)))
    equal = with_widths(unequal, replace(architecture_of(unequal), kv_groups=(2, 2, 2)))
    assert not equal.is_heterogeneous
    if family == "gpt2":  # transformers' module makes 32 channels of each of 2 heads
        assert (equal.n_head, equal.n_inner, equal.head_dim) == (2, 48, 16)
        assert portable_config(equal) is equal
    else:
        assert (equal.num_attention_heads, equal.num_key_value_heads, equal.intermediate_size) == (4, 2, 48)
        assert portable_config(equal).model_type == family


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("kv_groups", [(4, 4, 3), (3, 3, 3), (2, 2, 2)])
def test_all_else_in_the_configuration_survives(family: str, kv_groups: tuple[int, ...]) -> None:
    rotary = LLAMA3 if family != "phi3" else {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    if family == "gemma3_text":
        rotary = {
            kind: LLAMA3 | {"factor": factor} for kind, factor in (("full_attention", 8.0), ("sliding_attention", 4.0))
        }
    config = tiny_config(
        family,
        rope_parameters=rotary,
        rms_norm_eps=1e-3,
        bos_token_id=11,
        eos_token_id=[12, 13],
        pad_token_id=14,
        tie_word_embeddings=family == "llama",
        attention_dropout=0.25,
        use_cache=False,
        max_position_embeddings=99,
    )
    made = with_widths(config, replace(architecture_of(config), kv_groups=kv_groups))
    for result in (made, portable_config(made)):
        found = plain_dict(result)
        for name, value in plain_dict(config).items():
            if name not in WIDTHS:
                assert found[name] == value, name
        assert architecture_of(result).kv_groups == kv_groups
        assert architecture_of(result).head_dim == architecture_of(config).head_dim
        assert result.hidden_size == HIDDEN
    assert plain_dict(made)["rope_parameters"] == rotary


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, kind) for family in PLAIN for kind in ("eager", "sdpa") if (family, kind) != ("gemma2", "sdpa")],
)
def test_the_attention_implementation_survives(family: str, implementation: str) -> None:
    for kept in (KEPT, THREE):
        model = tiny_model(family, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation
        narrow_(model, kept)
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("family", PLAIN)
def test_the_original_configuration_is_left_alone(family: str) -> None:
    config = tiny_config(family)
    before = config.to_dict()
    portable_config(with_widths(config, replace(architecture_of(config), kv_groups=(1, 2, 3))))
    assert config.to_dict() == before


@pytest.mark.parametrize("family", PLAIN)
def test_our_configuration_is_the_familys_own_with_any_head_count(family: str) -> None:
    made = compressed_config_class(family)
    assert issubclass(made, getattr(transformers, FAMILIES[family].config_class))
    assert made is compressed_config_class(family)
    assert made(hidden_size=64, num_attention_heads=6, num_key_value_heads=3, head_dim=16).num_attention_heads == 6
    assert made.__name__ == f"Compressed{FAMILIES[family].config_class}"


@pytest.mark.parametrize("kept", [KEPT, TWO], ids=["unequal", "equal"])
def test_positions_of_a_phi3_stretched_to_long_texts_are_those_of_its_heads(kept: Any) -> None:
    # Transformers wants a factor for each pair of 64 / 8 channels, half of which turn; for 4 heads, of 64 / 4.
    stretched = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    stretched |= {"short_factor": [1.0, 2.0], "long_factor": [1.5, 3.0]}
    model = tiny_model("phi3", head_dim=8, rope_parameters=stretched, original_max_position_embeddings=64)
    narrow_(model, kept)
    assert portable_config(model.config) is model.config
    rotary = model.model.rotary_emb.inv_freq
    skeleton = build_skeleton(model.config)
    assert rotary.shape == (2,) and torch.equal(skeleton.model.rotary_emb.inv_freq, rotary)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits_of(skeleton.eval()), logits_of(model))


def test_a_layer_sees_its_widths_and_all_else_as_the_model_has_it() -> None:
    model = tiny_model("phi3")
    narrow_(model, KEPT)
    copied = copy.deepcopy(layer_config(model.config, 1))
    for seen, config in ((layer_config(model.config, 1), model.config), (copied, copied.config)):
        assert (seen.num_attention_heads, seen.num_key_value_heads, seen.intermediate_size) == (2, 1, 23)
        config.sliding_window = 5
        assert seen.sliding_window == 5
    narrow_(model, [((0,), (0,))] * 3)
    assert layer_config(model.config, 1) is model.config
