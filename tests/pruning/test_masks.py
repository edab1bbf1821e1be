"""What is masked acts as what is narrowed, in every family."""

from typing import Any

import pytest
import torch
from support.families import KEPT, PLAIN, adapted, logits_of, random_tokens, tiny_model
from torch import Tensor

from qpruner.adapters.lora import LoRAConfig, adapter_on, attach_adapters, detach_adapters, set_factors_
from qpruner.anatomy import decoder_layers
from qpruner.pruning.masks import UnitMasks
from qpruner.pruning.selection import Kept
from qpruner.pruning.surgery import narrow_, narrow_factors

VARIANTS = [
    *((family, {}) for family in PLAIN),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("gemma", {"num_key_value_heads": 1}),
    ("qwen2", {"num_key_value_heads": 8}),
    ("olmo2", {"num_key_value_heads": 8}),
    ("phi3", {"num_key_value_heads": 1}),
]
"""Families, with biases on every projection, multi-query and multi-head."""

EVERYTHING: Kept = [([0, 1, 2, 3], list(range(48)))] * 3


def kept_of(groups: int = 4) -> Kept:
    """`KEPT` for a model of so many KV groups."""
    by_layer = {4: [part[0] for part in KEPT], 1: [(0,)] * 3, 8: [(0, 3, 4, 7), (2,), (0, 1, 2, 5, 6)]}[groups]
    return [([*part], [*channels]) for part, (_, channels) in zip(by_layer, KEPT, strict=True)]


def masked(model: Any, *choices: Kept) -> UnitMasks:
    masks = UnitMasks(model.get_base_model())
    for kept in choices:
        masks.keep(kept)
    return masks


def narrowed(model: Any, kept: Kept) -> Any:
    """The same in a smaller model, adapters and all."""
    base, factors = detach_adapters(model)
    factors = narrow_factors(base, factors, kept)
    narrow_(base, kept)
    smaller = attach_adapters(base, LoRAConfig(r=3, alpha=6.0, dropout=0.0), seed=0)
    set_factors_(smaller, factors)
    return smaller.eval()


def alive_places(places: list[int], units: int, width: int) -> Tensor:
    """[units * width] bool."""
    return torch.tensor([unit in places for unit in range(units) for _ in range(width)])


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_what_is_masked_equals_what_is_narrowed(family: str, changes: dict[str, Any]) -> None:
    model = adapted(tiny_model(family, **changes))
    whole, kept = logits_of(model), kept_of(changes.get("num_key_value_heads", 4))
    masks = masked(model, kept)
    found = logits_of(model)
    masks.remove()
    assert torch.equal(logits_of(model), whole)
    assert (found - whole).abs().max() > 0.1
    smaller = narrowed(model, kept)
    torch.testing.assert_close(found, logits_of(smaller), rtol=1e-4, atol=1e-4)
    shapes = [(layer.kv_groups, layer.ffn_channels) for layer in decoder_layers(smaller.get_base_model())]
    assert shapes == [(len(groups), len(channels)) for groups, channels in kept]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_dead_units_put_out_zero_and_get_zero_gradients(family: str, changes: dict[str, Any]) -> None:
    model = adapted(tiny_model(family, **changes)).train()
    kept = kept_of(changes.get("num_key_value_heads", 4))
    masked(model, kept)
    seen: dict[Any, Tensor] = {}
    layers = decoder_layers(model.get_base_model())
    for layer in layers:
        for linear in (layer.o, layer.down):
            for part in (linear.base_layer, linear.lora_A["default"]):
                part.register_forward_hook(lambda module, inputs, _: seen.update({module: inputs[0]}))
    model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
    assert len(seen) == 3 * 2 * 2
    for layer, places in zip(layers, kept, strict=True):
        for parts, units in zip((layer.group_weights, layer.channel_weights), places, strict=True):
            for part in parts:
                alive = alive_places(units, part.num_units, part.width)
                adapter = adapter_on(part.linear)
                assert adapter is not None and adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
                gradient = (adapter.lora_B.grad if part.axis == 0 else adapter.lora_A.grad.T)[part.block]
                largest = gradient.abs().amax(1)
                assert not largest[~alive].any() and (largest[alive] > 0).all(), part.name
                if part.axis == 1:
                    for module in (part.linear.base_layer, part.linear.lora_A["default"]):
                        outputs = seen[module].abs().amax((0, 1))
                        assert not outputs[~alive].any() and (outputs[alive] > 0).all()


def test_all_units_are_alive_at_first_and_nothing_changes() -> None:
    model = adapted(tiny_model("llama"))
    expected = logits_of(model)
    masks = masked(model)
    assert masks.kept == EVERYTHING and torch.equal(logits_of(model), expected)
    masks.keep(EVERYTHING)
    assert torch.equal(logits_of(model), expected)


def test_a_later_choice_takes_the_place_of_an_earlier_one() -> None:
    other: Kept = [([1], list(range(20))), ([0, 1, 2, 3], list(range(48))), ([0, 3], [5, 6, 7])]
    found = []
    for choices in ((kept_of(), other), (other,), (kept_of(), EVERYTHING), ()):
        model = adapted(tiny_model("qwen2"))
        assert masked(model, *choices).kept == (choices[-1] if choices else EVERYTHING)
        found.append(logits_of(model))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not torch.equal(found[0], found[2])


def test_only_one_kind_of_unit_may_be_masked() -> None:
    for kept in ([([0, 2], list(range(48)))] * 3, [([0, 1, 2, 3], [4, 9])] * 3):
        model = adapted(tiny_model("llama"))
        masks = masked(model, kept)
        found = logits_of(model)
        masks.remove()
        torch.testing.assert_close(found, logits_of(narrowed(model, kept)), rtol=1e-4, atol=1e-4)


def test_masks_work_in_half_precision_and_without_gradients() -> None:
    model = adapted(tiny_model("llama")).to(torch.bfloat16)
    masks = masked(model, kept_of())
    found = logits_of(model)
    assert found.dtype == torch.bfloat16
    masks.remove()
    smaller = narrowed(model, kept_of()).to(torch.bfloat16)
    torch.testing.assert_close(found.float(), logits_of(smaller).float(), rtol=0.1, atol=0.3)
