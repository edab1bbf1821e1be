"""What a unit is worth by the gradients of adapters, against autograd and references of two lines."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.families import PLAIN, adapted, packed, random_tokens, tiny_model
from torch import Tensor, nn

from qpruner.adapters.lora import adapter_on
from qpruner.anatomy import Coupled, decoder_layers
from qpruner.plan import Precision
from qpruner.pruning import lora_guided
from qpruner.pruning.lora_guided import AdapterGradients, MovingAverage, Variant, score_adapted, unit_scores
from qpruner.pruning.scores import LayerScores
from qpruner.quantization.formats import dequantize

OUT, IN, RANK, SCALE = 6, 10, 2, 1.5
VARIANTS: list[Variant] = ["paper", "code"]


def backward(model: Any) -> Any:
    """The model below PEFT, with gradients on its adapters."""
    model(input_ids=random_tokens(), labels=random_tokens(), use_cache=False).loss.backward()
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts_of(base: Any) -> list[Coupled]:
    return [part for layer in decoder_layers(base) for part in (*layer.group_weights, *layer.channel_weights)]


def adapter_of(part: Coupled) -> tuple[Any, AdapterGradients]:
    adapter = adapter_on(part.linear)
    assert adapter is not None
    return adapter.base, AdapterGradients.of(adapter)


def random_adapter(dtype: torch.dtype = torch.float64) -> AdapterGradients:
    a, b, grad_a, grad_b = (torch.randn(*shape, dtype=dtype) for shape in [(RANK, IN), (OUT, RANK)] * 2)
    return AdapterGradients(a, b, grad_a, grad_b, SCALE)


def reference(part: Coupled, elements: Tensor, variant: Variant) -> Tensor:
    """Elements [out, in] summed by unit, as the docstring of `lora_guided` says it."""
    by_unit = (elements if part.axis == 0 else elements.T).double().chunk(part.num_units)
    sums = torch.stack([(one**2).sum() if variant == "paper" else one.abs().sum() for one in by_unit])
    return sums if variant == "paper" else sums / (sums**2).sum().sqrt()


def elements_of(base: Any, made: AdapterGradients) -> Tensor:
    """g (W + s B A), element by element."""
    s, a, b, da, db = made.scale, made.lora_A, made.lora_B, made.grad_A, made.grad_B
    return s * (db @ a + b @ da - db @ da) * (base.weight + s * b @ a)


def close(found: Tensor, expected: Tensor) -> None:
    """Scores, which are float64, up to the rounding of their float32 elements."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


# The gradient.


def test_both_terms_are_the_true_gradient_seen_through_the_adapter() -> None:
    weight, x = torch.randn(OUT, IN, dtype=torch.float64), torch.randn(20, IN, dtype=torch.float64)
    a = torch.randn(RANK, IN, dtype=torch.float64, requires_grad=True)
    b = torch.randn(OUT, RANK, dtype=torch.float64, requires_grad=True)
    (x @ (weight + SCALE * b @ a).T).tanh().square().sum().backward()
    merged = (weight + SCALE * b @ a).detach().requires_grad_()
    (x @ merged.T).tanh().square().sum().backward()
    assert a.grad is not None and b.grad is not None and merged.grad is not None
    adapter = AdapterGradients(a.detach(), b.detach(), a.grad, b.grad, SCALE)
    projected = (merged.grad @ a.T @ a + b @ b.T @ merged.grad).detach()
    torch.testing.assert_close((b.grad @ a + b @ a.grad).detach(), SCALE * projected)
    torch.testing.assert_close(adapter.gradient(slice(0, OUT), eta=0), SCALE**2 * projected)
    third = b.grad @ a.grad
    torch.testing.assert_close(adapter.gradient(slice(0, OUT)), SCALE**2 * projected - SCALE * third)
    torch.testing.assert_close(adapter.gradient(slice(2, 5), eta=0.5), (SCALE**2 * projected - 0.75 * third)[2:5])


def test_the_gradient_is_a_step_of_descent_on_the_product() -> None:
    """For eta as small as one likes; s (B A - (B - eta dB)(A - eta dA)) / eta."""
    one, eta = random_adapter(), 0.01
    stepped = (one.lora_B - eta * one.grad_B) @ (one.lora_A - eta * one.grad_A)
    expected = SCALE * (one.lora_B @ one.lora_A - stepped) / eta
    torch.testing.assert_close(one.gradient(slice(0, OUT), eta=eta), expected)


def test_in_a_model_it_is_the_projection_of_the_gradient_of_the_merged_weights() -> None:
    base = backward(adapted(tiny_model("llama")))
    merged = adapted(tiny_model("llama")).merge_and_unload().requires_grad_(True)
    backward(merged)
    for part, dense in zip(parts_of(base), parts_of(merged), strict=True):
        held, made = adapter_of(part)
        gradient, a, b = dense.linear.weight.grad, made.lora_A, made.lora_B
        assert made.scale == 2 and gradient is not None and gradient.abs().max() > 0
        expected = 2 * (gradient @ a.T @ a + b @ b.T @ gradient)
        tolerance = 1e-4 * float(expected.detach().abs().max())
        torch.testing.assert_close(made.grad_B @ a + b @ made.grad_A, expected, rtol=1e-3, atol=tolerance)
        every = slice(0, part.linear.out_features)
        torch.testing.assert_close(made.gradient(every, 0.0), 2 * expected, rtol=1e-3, atol=2 * tolerance)
        torch.testing.assert_close(made.merged(held.weight, every), dense.linear.weight, rtol=1e-5, atol=1e-6)


def test_an_adapter_without_gradients_counts_as_zero() -> None:
    part = parts_of(adapted(tiny_model("llama")).get_base_model())[0]
    _, made = adapter_of(part)
    assert made.grad_A.shape == made.lora_A.shape and made.grad_B.shape == made.lora_B.shape
    assert not made.gradient(slice(0, 3)).any()


# Scores of units.


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_unit_scores_the_sum_of_its_elements(variant: Variant) -> None:
    base = backward(adapted(tiny_model("llama")))
    seen = []
    for part in parts_of(base)[:7]:
        held, made = adapter_of(part)
        scores = unit_scores(part, held.weight, made, None, variant)
        assert scores.dtype == torch.float64 and len(scores) == part.num_units
        close(scores, reference(part, elements_of(held, made).detach(), variant))
        if variant == "code":
            assert float(scores.norm()) == pytest.approx(1)
        seen.append((part.name, part.axis, part.width, len(scores)))
    ffn = [("gate", 0, 1, 48), ("up", 0, 1, 48), ("down", 1, 1, 48)]
    assert seen == [("q", 0, 32, 4), ("k", 0, 16, 4), ("v", 0, 16, 4), ("o", 1, 32, 4), *ffn]


def test_two_units_by_hand() -> None:
    """W + s B A = [[1, 1], [1, 1]] with dA = [2, 0], dB = 0, B = [1, 3]: g = 2 [[2, 0], [6, 0]]."""
    a, b, grad_a, grad_b = torch.zeros(1, 2), [[1.0], [3.0]], [[2.0, 0.0]], torch.zeros(2, 1)
    adapter = AdapterGradients(a, torch.tensor(b), torch.tensor(grad_a), grad_b, 2.0)
    for axis, variant, expected in (
        (0, "paper", [16, 144]),
        (1, "paper", [160, 0]),
        (0, "code", [1 / 10**0.5, 3 / 10**0.5]),
        (1, "code", [1, 0]),
    ):
        part = Coupled("q", nn.Linear(2, 2), axis, 1, 2)
        scores = unit_scores(part, torch.ones(2, 2), adapter, None, variant)  # type: ignore[arg-type]
        assert scores.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_a_stacked_projection_is_scored_by_its_own_rows(family: str, variant: Variant) -> None:
    base = backward(adapted(tiny_model(family)))
    stacked = [part for part in parts_of(base) if part.name in ("q", "k", "v", "gate", "up")][:5]
    assert [part.start > 0 for part in stacked] == [False, True, True, False, family == "phi3"]
    for part in stacked:
        held, made = adapter_of(part)
        rows = part.block
        alone = Coupled(part.name, nn.Linear(64, rows.stop - rows.start), 0, part.width, part.num_units)
        of_rows = replace(made, lora_B=made.lora_B[rows], grad_B=made.grad_B[rows])
        given = torch.randn(held.weight.shape)
        for gradient, of_its_rows in ((None, None), (given, given[rows])):
            found = unit_scores(part, held.weight, made, gradient, variant)
            close(found, unit_scores(alone, held.weight[rows], of_rows, of_its_rows, variant))


@pytest.mark.parametrize("family", PLAIN)
def test_units_of_every_family_are_scored(family: str) -> None:
    scores = score_adapted(backward(adapted(tiny_model(family))), "code", None)
    assert [(len(one.kv_groups), len(one.ffn_channels)) for one in scores] == [(4, 48)] * 3
    assert all(bool((part > 0).all()) for one in scores for part in (one.kv_groups, one.ffn_channels))
    with_norms = [one.ffn_channels.square().sum().sqrt() for one in scores]
    assert all(1 < float(norm) <= 3 for norm in with_norms)  # of two or three projections of norm 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("at_once", [1, 200])
def test_pieces_make_no_difference(variant: Variant, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = backward(adapted(tiny_model("llama")))
    gradients = {part.linear: torch.randn(part.linear.out_features, part.linear.in_features) for part in parts_of(base)}
    for given in (None, gradients):
        whole = score_adapted(base, variant, given)
        with monkeypatch.context() as patch:
            patch.setattr(lora_guided, "ELEMENTS_AT_ONCE", at_once)
            pieces = score_adapted(base, variant, given)
        for one, other in zip(whole, pieces, strict=True):
            close(other.kv_groups, one.kv_groups)
            close(other.ffn_channels, one.ffn_channels)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_given_gradient_takes_the_place_of_the_adapters_and_stays_as_it_was(variant: Variant) -> None:
    base = backward(adapted(tiny_model("llama")))
    for part in parts_of(base)[:7]:
        held, made = adapter_of(part)
        given = torch.randn(held.weight.shape)
        before = given.clone()
        scores = unit_scores(part, held.weight, made, given, variant).detach()
        merged = held.weight + 2 * made.lora_B @ made.lora_A
        close(scores, reference(part, (given * merged).detach(), variant))
        assert torch.equal(given, before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_unit_that_is_merged_to_nothing_is_worth_nothing(variant: Variant) -> None:
    """W = -s B A, whatever its gradients are."""
    model = adapted(tiny_model("llama"))
    base = model.get_base_model()
    for part in parts_of(base)[:7]:
        held, made = adapter_of(part)
        unit = slice(part.width, 2 * part.width)
        place = (unit,) if part.axis == 0 else (slice(None), unit)
        with torch.no_grad():
            held.weight[place] = -(2 * made.lora_B @ made.lora_A)[place]
    scores = score_adapted(backward(model), variant, None)
    for of_kind in (scores[0].kv_groups, scores[0].ffn_channels):
        others = torch.cat([of_kind[:1], of_kind[2:]])
        assert float(of_kind[1]) < 1e-5 * float(others.min())
    assert scores[1].kv_groups.min() > 0 and scores[1].ffn_channels.min() > 0


# Models.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("k_proj", "v_proj", "o_proj", "gate_proj"), ()], ids=str)
def test_linears_with_adapters_add_up_and_others_say_nothing(variant: Variant, targets: tuple[str, ...]) -> None:
    base = backward(adapted(tiny_model("llama"), **({"target_modules": targets} if targets else {})))
    scores = score_adapted(base, variant, None)
    assert len(scores) == 3
    for layer, found in zip(decoder_layers(base), scores, strict=True):
        for parts, of_kind in ((layer.group_weights, found.kv_groups), (layer.channel_weights, found.ffn_channels)):
            said = [part for part in parts if not targets or f"{part.name}_proj" in targets]
            expected = sum(reference(part, elements_of(*adapter_of(part)).detach(), variant) for part in said)
            close(of_kind, torch.as_tensor(expected))


@pytest.mark.parametrize("precision", [Precision("nf4", 4), Precision("nf4-double", 4), Precision("int8", 8)], ids=str)
def test_a_packed_base_is_scored_by_the_weight_it_stands_for(precision: Precision) -> None:
    base = backward(adapted(packed(tiny_model("qwen2"), precision)))
    dense = adapted(tiny_model("qwen2")).get_base_model()
    for part, other in zip(parts_of(base), parts_of(dense), strict=True):
        adapter, twin = adapter_on(part.linear), adapter_on(other.linear)
        assert adapter is not None and twin is not None
        twin.lora_A.grad, twin.lora_B.grad = adapter.lora_A.grad, adapter.lora_B.grad
        twin.base.weight.data = dequantize(adapter.base)  # type: ignore[arg-type, union-attr]
    found, expected = (score_adapted(one, "paper", None) for one in (base, dense))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.kv_groups, other.kv_groups) and torch.equal(one.ffn_channels, other.ffn_channels)
    original = adapted(tiny_model("qwen2")).get_base_model()
    for part, other in zip(parts_of(dense), parts_of(original), strict=True):
        adapter, twin = adapter_on(part.linear), adapter_on(other.linear)
        twin.lora_A.grad, twin.lora_B.grad = adapter.lora_A.grad, adapter.lora_B.grad  # type: ignore[union-attr]
    assert not torch.equal(score_adapted(original, "paper", None)[0].kv_groups, found[0].kv_groups)


# The average.


def layer(groups: list[float], channels: list[float]) -> LayerScores:
    return LayerScores(torch.tensor(groups, dtype=torch.float64), torch.tensor(channels, dtype=torch.float64))


def test_the_average_by_hand() -> None:
    average = MovingAverage(0.9, [layer([0, 0], [0]), layer([0, 0], [0])])
    average.add([layer([1, 2], [3]), layer([0, 10], [0])])
    average.add([layer([3, 0], [1]), layer([5, 10], [0])])
    (first, second) = average.scores
    assert first.kv_groups.tolist() == pytest.approx([0.39, 0.18]) and first.ffn_channels.tolist() == [
        pytest.approx(0.37)
    ]
    assert second.kv_groups.tolist() == pytest.approx([0.5, 1.9]) and second.ffn_channels.tolist() == [0]
    assert (average.steps, average.skipped) == (2, 0)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [0, 1])
def test_steps_that_are_not_finite_are_left_out_and_counted(broken: float, kind: int) -> None:
    average = MovingAverage(0.9, [layer([0, 0], [0]), layer([0, 0], [0])])
    average.add([layer([1, 2], [3]), layer([0, 10], [0])])
    spoilt = layer([broken, 0], [0]) if kind == 0 else layer([0, 0], [broken])
    average.add([layer([7, 7], [7]), spoilt])
    assert (average.steps, average.skipped) == (1, 1)
    average.add([layer([3, 0], [1]), layer([5, 10], [0])])
    assert average.scores[0].kv_groups.tolist() == pytest.approx([0.39, 0.18])
    assert (average.steps, average.skipped) == (2, 1)


def test_without_decay_only_the_last_step_counts() -> None:
    average = MovingAverage(0.0, [layer([0], [0])])
    for value in (5.0, 2.0):
        average.add([layer([value], [value])])
    assert average.scores[0].kv_groups.tolist() == [2]
