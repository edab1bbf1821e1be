"""Orders of hidden channels, KV groups and FFN channels: a permuted model computes the same."""

import random
import re
from typing import Any

import pytest
import torch
from support.calibration import calibration
from support.families import FFN, HIDDEN, KEPT, LAYERS, PLAIN, adapted, logits_of, packed, random_tokens, tiny_model
from torch import nn

from qpruner.adapters.lora import LoRAConfig, attach_adapters, detach_adapters, set_factors_
from qpruner.anatomy import FAMILIES, architecture_of, decoder_layers
from qpruner.errors import UserError
from qpruner.outline import outline_of
from qpruner.plan import CompressionPlan, Precision
from qpruner.pruning.compensation import How, compensate_, shared_copy
from qpruner.pruning.order import reorder_hidden_
from qpruner.pruning.surgery import apply_pruning_, narrow_, narrow_factors

VARIANTS = [
    *((family, {}) for family in PLAIN),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma", {"num_key_value_heads": 1}),
    ("olmo2", {"num_key_value_heads": 8, "attention_bias": True}),
]
ORDER = random.Random(5).sample(range(HIDDEN), HIDDEN)
SHUFFLED = [
    tuple(tuple(random.Random(number).sample(units, len(units))) for units in layer)
    for number, layer in enumerate(KEPT)
]
"""What `KEPT` keeps, in another order."""


def orders(model: Any) -> list[tuple[list[int], list[int]]]:
    """All units of each layer, shuffled."""
    draw = random.Random(3)
    return [
        (draw.sample(range(layer.kv_groups), layer.kv_groups), draw.sample(range(FFN), FFN))
        for layer in decoder_layers(model)
    ]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_hidden_channels_in_another_order_compute_the_same(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    expected, before = logits_of(model), dict(model.named_parameters())
    reorder_hidden_(model, ORDER)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    embedding = f"{FAMILIES[family].embedding}.weight"
    assert torch.equal(after[embedding], before[embedding][:, ORDER])
    inner = re.compile(r"(q_norm|k_norm)\.weight|(q_proj|k_proj|v_proj|gate_proj|up_proj|c_attn|c_fc|qkv_proj)\.bias")
    for name, parameter in before.items():
        # Of random weights every order is another, but where no axis is of hidden channels.
        assert torch.equal(after[name], parameter) == bool(inner.search(name)), name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        model.config.tie_word_embeddings
    )


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_units_in_another_order_compute_the_same(family: str, changes: dict[str, Any]) -> None:
    model = tiny_model(family, **changes)
    expected, before = logits_of(model), decoder_layers(model)[1].down.weight
    permutation = orders(model)
    narrow_(model, permutation)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(decoder_layers(model)[1].down.weight, before[:, permutation[1][1]])


@pytest.mark.parametrize("family", PLAIN)
def test_a_plan_keeps_units_in_its_order(family: str) -> None:
    ascending, shuffled = tiny_model(family), tiny_model(family)
    dense = CompressionPlan.dense(architecture_of(ascending.config), None)
    apply_pruning_(ascending, dense.keeping(KEPT))
    plan = dense.reordered(ORDER).keeping(SHUFFLED)
    apply_pruning_(shuffled, CompressionPlan.from_json(plan.to_json()))
    torch.testing.assert_close(logits_of(shuffled), logits_of(ascending), rtol=1e-4, atol=1e-4)
    down = decoder_layers(shuffled)[1].down.weight
    dense_down = decoder_layers(tiny_model(family))[1].down.weight
    assert torch.equal(down, dense_down[ORDER][:, SHUFFLED[1][1]])


def test_an_order_and_then_another_is_their_product() -> None:
    twice, once = tiny_model("llama"), tiny_model("llama")
    other = random.Random(6).sample(range(HIDDEN), HIDDEN)
    reorder_hidden_(twice, ORDER)
    reorder_hidden_(twice, other)
    dense = CompressionPlan.dense(architecture_of(once.config), None)
    reorder_hidden_(once, dense.reordered(ORDER).reordered(other).hidden)  # type: ignore[arg-type]
    for (name, one), two in zip(once.named_parameters(), twice.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_copy_that_shares_its_tensors_stays_as_it_was() -> None:
    dense = tiny_model("llama").requires_grad_(False)
    copy = shared_copy(dense)
    reorder_hidden_(copy, ORDER)
    assert torch.equal(logits_of(dense), logits_of(tiny_model("llama")))
    assert not any(parameter.requires_grad for parameter in copy.parameters())


@pytest.mark.parametrize("family", PLAIN)
def test_shapes_without_weights_are_reordered_too(family: str) -> None:
    outline = outline_of(tiny_model(family).config)
    shapes = {name: parameter.shape for name, parameter in outline.named_parameters()}
    reorder_hidden_(outline, ORDER)
    assert {name: parameter.shape for name, parameter in outline.named_parameters()} == shapes


def test_packed_weights_are_refused() -> None:
    with pytest.raises(UserError, match="^The hidden channels of packed weights cannot be put into another order"):
        reorder_hidden_(packed(tiny_model("llama"), Precision("int8", 8)), ORDER)


def test_what_the_anatomy_does_not_know_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.memory = nn.Parameter(torch.ones(HIDDEN))
    before = logits_of(model)
    with pytest.raises(
        UserError, match=r"this llama cannot be .* whether model.layers.1.mlp.memory would have to follow"
    ):
        reorder_hidden_(model, ORDER)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2"])
def test_adapters_keep_to_their_units_in_any_order(family: str) -> None:
    wrapped = adapted(tiny_model(family))
    config = wrapped.peft_config["default"]

    def narrowed(kept: Any) -> torch.Tensor:
        base, factors = detach_adapters(adapted(tiny_model(family)))
        factors = narrow_factors(base, factors, kept)
        narrow_(base, kept)
        lora = LoRAConfig(r=config.r, alpha=config.lora_alpha, dropout=0.0)
        again = attach_adapters(base, lora, seed=0)
        set_factors_(again, factors)
        return logits_of(again.eval())

    torch.testing.assert_close(narrowed(SHUFFLED), narrowed(KEPT), rtol=1e-4, atol=1e-4)
    assert (narrowed(KEPT) - logits_of(wrapped)).abs().max() > 0.1


@pytest.mark.parametrize("how", ["sequential", "local"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compensation_finds_the_same_in_any_order(family: str, how: How) -> None:
    text = random_tokens(24, 20)

    def compensated(kept: Any, order: list[int]) -> tuple[Any, Any]:
        dense = tiny_model(family).requires_grad_(False)
        reorder_hidden_(dense, order)
        narrow = shared_copy(dense)
        narrow_(narrow, kept)
        fits = compensate_(narrow, dense, kept, calibration(8, text), how)
        return narrow, fits

    ascending, fits = compensated(KEPT, list(range(HIDDEN)))
    shuffled, others = compensated(SHUFFLED, ORDER)
    assert sum(fit.changes for fit in fits.values()) > LAYERS
    for name, fit in fits.items():
        assert others[name].after == pytest.approx(fit.after, rel=1e-3), name
    torch.testing.assert_close(logits_of(shuffled), logits_of(ascending), rtol=1e-2, atol=1e-2)
