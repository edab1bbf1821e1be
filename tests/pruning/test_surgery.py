import copy
import re
from typing import Any

import pytest
import torch
from support.families import KEPT, PLAIN, VOCAB, logits_of, random_tokens, tiny_config, tiny_model
from torch import Tensor

from qpruner.anatomy import FAMILIES, architecture_of, decoder_blocks, decoder_layers
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan
from qpruner.pruning.surgery import apply_pruning_, narrow_, norm_scale, stated_by_weights
from qpruner.pruning.widths import set_config

VARIANTS = [
    *((family, {}) for family in PLAIN),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("gemma", {"num_key_value_heads": 1}),
    ("qwen2", {"num_key_value_heads": 8}),
    ("olmo2", {"num_key_value_heads": 8, "attention_bias": True}),
    ("phi3", {"num_key_value_heads": 8}),
]
"""Families, with biases on every projection, multi-query and multi-head."""


def kept_of(groups: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """`KEPT` for a model of so many KV groups, another choice for each layer."""
    by_layer = {4: [part[0] for part in KEPT], 1: [(0,)] * 3, 8: [(0, 3, 4, 7), (2,), (0, 1, 2, 5, 6)]}[groups]
    return [(part, channels) for part, (_, channels) in zip(by_layer, KEPT, strict=True)]


def heads_of(family: str) -> list[int]:
    """Query heads that `KEPT` leaves to each layer."""
    return [len(groups) * (1 if family == "gpt2" else 2) for groups, _ in KEPT]


def narrowed(family: str, **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    narrow_(model, kept_of(changes.get("num_key_value_heads", 4)))
    return model


def places(units: Any, width: int) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_units_without_output_can_go_unnoticed(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    untouched = logits_of(model)
    kept = kept_of(changes.get("num_key_value_heads", 4))
    for layer, (groups, channels) in zip(decoder_layers(model), kept, strict=True):
        width = layer.head_dim * layer.queries_per_group
        with torch.no_grad():
            for linear, units, size in ((layer.o, groups, width), (layer.down, channels, 1)):
                gone = sorted(set(range(linear.in_features)) - set(places(units, size)))
                linear.weight[:, gone] = 0
            for norm in layer.wide_norms:  # in whose mean square all heads count
                gone = sorted(set(range(len(norm.norm.weight))) - set(places(groups, norm.of.width)))
                norm.of.linear.weight[gone] = 0
                if norm.of.linear.bias is not None:
                    norm.of.linear.bias[gone] = 0
    expected = logits_of(model)
    narrow_(model, kept)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)
    assert (expected - untouched).abs().max() > 0.1  # so the units had a say before
    shapes = [(layer.kv_groups, layer.ffn_channels) for layer in decoder_layers(model)]
    assert shapes == [(len(groups), len(channels)) for groups, channels in kept]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_what_is_left_is_the_kept_rows_and_columns(family: str, changes: dict[str, Any]) -> None:
    dense, model = tiny_model(family, **changes), tiny_model(family, **changes)
    kept = kept_of(changes.get("num_key_value_heads", 4))
    narrow_(model, kept)
    expected = dict(dense.named_parameters())
    for number, (groups, channels) in enumerate(kept):
        layer = decoder_layers(dense)[number]
        queries = places(groups, layer.head_dim * layer.queries_per_group)
        keys = places(groups, layer.head_dim)
        rows, columns = kept_places(family, queries, keys, list(channels), of_keys=layer.kv_groups * layer.head_dim)
        prefix = f"{FAMILIES[family].layers}.{number}"
        for name, index in rows.items():
            for part in ("weight", "bias"):
                if (key := f"{prefix}.{name}.{part}") in expected:
                    expected[key] = expected[key][index]
        for name, index in columns.items():
            expected[key] = expected[key := f"{prefix}.{name}.weight"][:, index]
        if family == "olmo2":
            for name, index in (("q", queries), ("k", keys)):
                of_all = dense.get_parameter(f"{prefix}.self_attn.{name}_proj.weight").square()
                key = f"{prefix}.self_attn.{name}_norm.weight"
                expected[key] = expected[key][index] * (of_all[index].mean() / of_all.mean()).sqrt()
    found = dict(model.named_parameters())
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        if "q_norm" in name or "k_norm" in name:
            torch.testing.assert_close(found[name], tensor)
        else:
            assert torch.equal(found[name], tensor), name
    for layer in decoder_layers(model):
        for linear in layer.linears.values():
            assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


def kept_places(
    family: str, queries: list[int], keys: list[int], channels: list[int], *, of_keys: int
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Rows and columns that stay, by the path of a linear in a tiny model's layer with so many rows of keys."""

    def below(above: int, rows: list[int]) -> list[int]:
        return [above + row for row in rows]

    if family == "gpt2":  # as many rows of queries
        rows = {"attn.c_attn": queries + below(of_keys, keys) + below(2 * of_keys, keys), "mlp.c_fc": channels}
        return rows, {"attn.c_proj": queries, "mlp.c_proj": channels}
    columns = {"self_attn.o_proj": queries, "mlp.down_proj": channels}
    if family == "phi3":  # 128 rows of queries, 48 of gate
        qkv = queries + below(128, keys) + below(128 + of_keys, keys)
        return {"self_attn.qkv_proj": qkv, "mlp.gate_up_proj": channels + below(48, channels)}, columns
    rows = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    return rows | {"mlp.gate_proj": channels, "mlp.up_proj": channels}, columns


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_greedy_generation_is_the_same_with_and_without_cache(family: str, changes: dict[str, Any]) -> None:
    model = narrowed(family, **changes)
    tokens, mask = random_tokens(), torch.ones(2, 12, dtype=torch.long)
    tokens[1, :5], mask[1, :5] = 0, 0

    def generate(tokens: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=5,
            min_new_tokens=5,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        return out.sequences[:, tokens.shape[1] :], torch.stack(out.logits, dim=1)

    cached, cached_logits = generate(tokens, mask, use_cache=True)
    uncached, uncached_logits = generate(tokens, mask, use_cache=False)
    assert cached.shape == (2, 5) and torch.equal(cached, uncached)
    torch.testing.assert_close(cached_logits, uncached_logits, rtol=1e-4, atol=1e-4)
    # What stands before a text to fill the batch changes nothing.
    alone, alone_logits = generate(tokens[1:, 5:], mask[1:, 5:], use_cache=True)
    assert torch.equal(alone, cached[1:])
    torch.testing.assert_close(alone_logits, cached_logits[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PLAIN)
def test_later_tokens_do_not_change_earlier_logits(family: str) -> None:
    model, tokens = narrowed(family), random_tokens()
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    before, after = logits_of(model, tokens), logits_of(model, changed)
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=1e-5, atol=1e-5)
    assert ((after - before)[:, 7:].abs().amax(-1) > 1e-3).all()


def test_the_sliding_window_is_still_there() -> None:
    model, tokens = narrowed("mistral"), random_tokens(length=26)
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    before, after = logits_of(model, tokens), logits_of(model, changed)
    # Three layers that see 7 tokens back each.
    assert (after - before)[:, :20].abs().amax(-1).min() > 0
    torch.testing.assert_close(after[:, 22:], before[:, 22:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in PLAIN if family != "gemma2"])
def test_sdpa_equals_eager(family: str) -> None:
    # Gemma2 caps its attention scores, which sdpa cannot.
    model, mask = narrowed(family), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    logits = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(input_ids=random_tokens(), attention_mask=mask, output_attentions=implementation == "eager")
        logits[implementation] = out.logits[mask.bool()]
    assert [tuple(a.shape) for a in out.attentions] == [(2, heads, 12, 12) for heads in heads_of(family)]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("family", PLAIN)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = narrowed(family).train()
        decoder_layers(model)[0].q.register_forward_hook(lambda *_: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(calls) == 3  # once, and once again in the backward of the second
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", PLAIN)
def test_a_copy_is_the_same_model_with_weights_of_its_own(family: str) -> None:
    model = narrowed(family)
    expected = logits_of(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(copied), expected)
    assert stated_by_weights(copied) == architecture_of(copied.config)


@pytest.mark.parametrize("family", PLAIN)
def test_narrowing_twice_is_narrowing_once(family: str) -> None:
    second = [((0, 2), range(1, 30)), ((0,), range(0, 23, 3)), ((1, 3), (0,))]
    composed = [
        (tuple(groups[i] for i in places_of_groups), tuple(channels[i] for i in places_of_channels))
        for (groups, channels), (places_of_groups, places_of_channels) in zip(KEPT, second, strict=True)
    ]
    assert [groups for groups, _ in composed] == [(0, 3), (1,), (1, 3)]
    twice, once = narrowed(family), tiny_model(family)
    narrow_(twice, second)
    narrow_(once, composed)
    assert twice.config.to_dict() == once.config.to_dict()
    if family == "olmo2":  # whose norms are scaled twice
        torch.testing.assert_close(list(twice.parameters()), list(once.parameters()))
        torch.testing.assert_close(logits_of(twice), logits_of(once), rtol=1e-4, atol=1e-4)
    else:
        assert all(torch.equal(a, b) for a, b in zip(twice.parameters(), once.parameters(), strict=True))
        assert torch.equal(logits_of(twice), logits_of(once))


@pytest.mark.parametrize("family", PLAIN)
def test_keeping_everything_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    expected, before = logits_of(model), list(model.parameters())
    narrow_(model, [(range(4), range(48))] * 3)
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("family", PLAIN)
def test_every_part_has_the_new_configuration(family: str) -> None:
    model = narrowed(family)
    readers = {
        block.get_submodule(path): number
        for number, block in enumerate(decoder_blocks(model))
        for path in FAMILIES[family].reads_config
    }
    if FAMILIES[family].rotary is not None:
        readers[model.get_submodule(FAMILIES[family].rotary)] = 0
    for module in readers:  # as their layer sees it
        assert module.config.num_attention_heads == heads_of(family)[readers[module]]
        assert module.config.config is model.config and module.config.rope_parameters is model.config.rope_parameters
    configs = [module.config for module in model.modules() if hasattr(module, "config") and module not in readers]
    assert len(configs) > 3 and all(config is model.config for config in configs)
    assert architecture_of(model.config) == stated_by_weights(model)


def test_a_norm_over_all_heads_is_scaled_by_hand() -> None:
    layer = decoder_layers(tiny_model("olmo2"))[0]
    for norm in layer.wide_norms:
        with torch.no_grad():
            norm.of.by_unit(norm.of.linear.weight).copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1))
        assert float(norm_scale(norm, [0, 2, 3])) == pytest.approx(((1 + 9 + 16) / 3 / (30 / 4)) ** 0.5)
        assert float(norm_scale(norm, range(4))) == 1
        norm.of.linear.weight.data[: norm.of.width] = 0  # of the first of four
        assert float(norm_scale(norm, [1, 2, 3])) == pytest.approx((4 / 3) ** 0.5)


def test_weights_without_gradients_stay_without() -> None:
    model = tiny_model("qwen2").requires_grad_(False)
    decoder_layers(model)[0].q.weight.requires_grad_(True)
    narrow_(model, KEPT)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]


def test_a_model_on_the_meta_device_is_narrowed_too() -> None:
    model = tiny_model("qwen2").to("meta")
    narrow_(model, KEPT)
    expected = narrowed("qwen2")
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_as_they_were_tied(family: str, tied: bool) -> None:
    model = narrowed(family, tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == tied


# Plans.


def plan_for(model: Any) -> CompressionPlan:
    return CompressionPlan.dense(architecture_of(model.config), None)


@pytest.mark.parametrize("family", PLAIN)
def test_a_plan_is_carried_out(family: str) -> None:
    model = tiny_model(family)
    plan = plan_for(model).keeping(KEPT)
    apply_pruning_(model, plan)
    assert stated_by_weights(model) == plan.widths == architecture_of(model.config)
    assert torch.equal(logits_of(model), logits_of(narrowed(family)))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"hidden_size": 32}, "hidden_size is 32 there and 64 here"),
        ({"head_dim": 8}, "head_dim is 8 there and 16 here"),
        ({"intermediate_size": 40}, "ffn_channels is (40, 40, 40) there and (48, 48, 48) here"),
        ({"num_key_value_heads": 8}, "queries_per_group is 1 there and 2 here; kv_groups is (8, 8, 8) there and"),
        ({"num_hidden_layers": 2}, "kv_groups is (4, 4) there and (4, 4, 4) here"),
    ],
)
def test_a_plan_of_another_shape_is_refused(changes: dict[str, Any], difference: str) -> None:
    model = tiny_model("llama")
    expected = logits_of(model)
    plan = CompressionPlan.dense(architecture_of(tiny_config("llama", **changes)), None)
    with pytest.raises(UserError, match=re.escape(f"The plan does not fit the model: {difference}")):
        apply_pruning_(model, plan)
    assert torch.equal(logits_of(model), expected)


def test_a_plan_of_another_family_is_refused() -> None:
    with pytest.raises(UserError, match="model_type is mistral there and llama here"):
        apply_pruning_(tiny_model("llama"), plan_for(tiny_model("mistral")))


@pytest.mark.parametrize("family", PLAIN)
def test_a_model_that_was_pruned_is_not_pruned_again(family: str) -> None:
    model = tiny_model(family)
    plan = plan_for(model).keeping(KEPT)
    apply_pruning_(model, plan)
    with pytest.raises(UserError, match=re.escape("kv_groups is (4, 4, 4) there and (3, 1, 4) here")):
        apply_pruning_(model, plan)


@pytest.mark.parametrize("family", PLAIN)
def test_a_configuration_that_lies_about_the_weights_is_refused(family: str) -> None:
    model = narrowed(family)
    set_config(model, tiny_config(family))
    message = (
        "kv_groups is (4, 4, 4) there and (3, 1, 4) here; ffn_channels is (48, 48, 48) there and (37, 23, 1) here."
    )
    with pytest.raises(UserError, match=re.escape(message)):
        apply_pruning_(model, plan_for(model))
