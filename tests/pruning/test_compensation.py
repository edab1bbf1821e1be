"""What the weights that stay make up for, against least squares on what the whole models show."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import calibration, in_processes
from support.families import FFN, KEPT, LAYERS, PLAIN, adapted, each_of, random_tokens, tiny_model
from torch import Tensor

from qpruner.anatomy import architecture_of, decoder_blocks, decoder_layers, family_of
from qpruner.anatomy.coupled import within
from qpruner.calibration.regression import Change, Fit
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.errors import UserError
from qpruner.offload import Offload, offload_, tensors_of
from qpruner.plan import CompressionPlan
from qpruner.pruning.compensation import (
    HELD_OUT,
    How,
    add_,
    check_text,
    compensate_,
    describe,
    places_among,
    shared_copy,
)
from qpruner.pruning.surgery import narrow_

S, T = 24, 20
TEXT = random_tokens(S, T)


def pruned(family: str, **changes: Any) -> tuple[Any, Any]:
    """A tiny model before and after pruning."""
    dense = tiny_model(family, **changes).requires_grad_(False)
    narrow = shared_copy(dense)
    narrow_(narrow, KEPT)
    return dense, narrow


def seen(model: Any, number: int) -> dict[str, Tensor]:
    """What a layer and its linears got and gave when all text went through the whole model."""
    layer, block, values = decoder_layers(model)[number], decoder_blocks(model)[number], {}
    handles = [block.register_forward_pre_hook(lambda _, args: values.update(hidden=args[0]))]
    for name, linear in (("o", layer.o), ("down", layer.down)):
        handles.append(
            linear.register_forward_hook(
                lambda _, args, output, name=name: values.update({f"{name} in": args[0], f"{name} out": output})
            )
        )
    with torch.no_grad():
        model(input_ids=TEXT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: value.double() for name, value in values.items()}


def ridge_regression(inputs: Tensor, missing: Tensor, weights: Tensor, ridge: float, *, bias: bool) -> Tensor:
    """The change of the weight, on tokens [S, T, ...]."""
    x, e, w = (value.flatten(0, 1) for value in (inputs, missing, weights.unsqueeze(-1)))
    if bias:
        x, e = x - (w * x).sum(0) / w.sum(), e - (w * e).sum(0) / w.sum()
    gram = x.T @ (w * x)
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ (w * e)).T


def expected_change(dense: Any, narrow: Any, number: int, name: str, how: How, ridge: float, factor: float) -> Tensor:
    """By what a weight is to change, from whole models whose earlier linears are changed already."""
    there, here = seen(dense, number), seen(narrow, number)
    normed = family_of(dense.config)[1].normed_outputs
    whole, linear = (getattr(decoder_layers(model)[number], name) for model in (dense, narrow))

    def behind(side: dict[str, Tensor]) -> Tensor:
        if normed:
            return side[f"{name} out"]
        behind_o = side["hidden"] / factor + side["o out"]
        return behind_o if name == "o" else behind_o + side["down out"]

    if how == "local":
        width = whole.in_features // (FFN if name == "down" else architecture_of(dense.config).kv_groups[number])
        inputs = there[f"{name} in"][..., within(KEPT[number][name == "down"], width)]
        given = torch.nn.functional.linear(inputs, linear.weight.double(), _double(linear.bias))
        missing = there[f"{name} out"] - given
    else:
        inputs, missing = here[f"{name} in"], behind(there) - behind(here)
    weights = 1 / behind(there).square().mean(-1)
    return ridge_regression(inputs, missing, weights, ridge, bias=linear.bias is not None)


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


@pytest.mark.parametrize("how", ["sequential", "local"])
@each_of(PLAIN)
def test_each_linear_is_solved_on_what_the_narrowed_prefix_gives_it(family: str, how: How) -> None:
    dense, narrow = pruned(family)
    fits = compensate_(narrow, dense, KEPT, calibration(5, TEXT), how)
    _, sliced = pruned(family)
    factor = getattr(dense.config, "residual_multiplier", 1.0)
    assert sum(fit.changes for fit in fits.values()) >= 2
    for number, (before, after) in enumerate(zip(decoder_layers(sliced), decoder_layers(narrow), strict=True)):
        for name in ("o", "down"):
            old, new, fit = getattr(before, name), getattr(after, name), fits[f"{number}.{name}"]
            change = torch.zeros_like(old.weight)
            if fit.changes:
                change = expected_change(dense, sliced, number, name, how, fit.ridge, factor).float()
            torch.testing.assert_close(new.weight - old.weight, change, rtol=2e-3, atol=2e-4 * float(old.weight.std()))
            if how == "sequential":
                old.weight, old.bias = new.weight, new.bias  # the prefix of what comes next


@pytest.mark.parametrize("how", ["sequential", "local"])
def test_no_linear_is_worse_on_held_out_text_and_those_that_would_be_stay_slices(how: How) -> None:
    text = random_tokens(HELD_OUT, T)  # 48 tokens that decide over up to 48 channels
    dense, narrow = pruned("llama")
    fits = compensate_(narrow, dense, KEPT, calibration(2, text), how)
    kept = [name for name, fit in fits.items() if not fit.changes]
    assert kept and all(fit.after <= fit.before for fit in fits.values())
    for name in kept:
        number, projection = name.split(".")
        weight = getattr(decoder_layers(narrow)[int(number)], projection).weight
        assert torch.equal(weight, getattr(decoder_layers(pruned("llama")[1])[int(number)], projection).weight)


def test_text_that_was_not_seen_comes_nearer_to_the_dense_model() -> None:
    dense, narrow = pruned("qwen2")
    text = random_tokens(2 * S, T)[S:]

    def distance() -> float:
        with torch.no_grad():
            difference = narrow(input_ids=text).logits - dense(input_ids=text).logits
        return float(difference.square().mean())

    before = distance()
    compensate_(narrow, dense, KEPT, calibration(5, TEXT), "sequential")
    assert distance() < 0.97 * before


@pytest.mark.parametrize("how", ["sequential", "local"])
def test_units_that_write_nothing_leave_nothing_to_make_up_for(how: How) -> None:
    dense = tiny_model("llama").requires_grad_(False)
    for layer, (groups, channels) in zip(decoder_layers(dense), KEPT, strict=True):
        for part, units in ((layer.group_weights[-1], groups), (layer.channel_weights[-1], channels)):
            if gone := [unit for unit in range(part.num_units) if unit not in units]:
                part.linear.weight.data[:, part.places(gone)] = 0
    narrow = shared_copy(dense)
    narrow_(narrow, KEPT)
    compensate_(narrow, dense, KEPT, calibration(5, TEXT), how)
    with torch.no_grad():
        torch.testing.assert_close(narrow(input_ids=TEXT).logits, dense(input_ids=TEXT).logits, rtol=1e-4, atol=1e-4)


def test_micro_batches_do_not_matter() -> None:
    weights = []
    for size in (1, S):
        dense, narrow = pruned("llama")
        compensate_(narrow, dense, KEPT, calibration(size, TEXT), "sequential")
        weights.append(torch.cat([layer.down.weight.flatten() for layer in decoder_layers(narrow)]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_two_processes_find_what_one_does() -> None:
    models = [pruned("gpt2") for _ in range(3)]  # threads would share the numbers that random weights are drawn from

    def work(given: Calibration) -> tuple[list[Tensor], dict[str, Fit]]:
        dense, narrow = models.pop()
        fits = compensate_(narrow, dense, KEPT, given, "sequential")
        parts = [part for layer in decoder_layers(narrow) for part in (layer.o, layer.down)]
        return [tensor for part in parts for tensor in (part.weight, part.bias)], fits

    (alone, fits), (first, _), (second, _) = *in_processes(1, 2, work), *in_processes(2, 2, work)
    assert any(fit.changes for fit in fits.values())
    for one, mine, theirs in zip(alone, first, second, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["sequential", "local"])
def test_of_an_offloaded_model_only_weights_are_left_in_files(tmp_path: Path, how: How) -> None:
    """Sums, targets and states lay there, too, and the fits are those of a model in memory."""
    expected = compensate_(*reversed(pruned("llama")), KEPT, calibration(5, TEXT), how)
    dense = tiny_model("llama").requires_grad_(False)
    offload_(dense, Offload(tmp_path))
    narrow = shared_copy(dense)
    narrow_(narrow, KEPT)
    assert compensate_(narrow, dense, KEPT, calibration(5, TEXT), how) == expected
    blocks = [block for model in (dense, narrow) for block in decoder_blocks(model)]
    weights = {tensor.data_ptr() for block in blocks for tensor in tensors_of(block)}
    assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/.offload-") == len(weights)
    assert list(tmp_path.iterdir()) == []


def test_adapters_count_and_stay_as_they_are() -> None:
    """The base makes up for what went, so that what the adapters do to it stays."""
    whole = adapted(tiny_model("llama").requires_grad_(False))
    model = adapted(tiny_model("llama").requires_grad_(False))
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    everything = [(list(range(4)), list(range(FFN)))] * LAYERS
    fits = compensate_(model, whole, everything, calibration(5, TEXT), "sequential")
    assert all(not fit.changes for fit in fits.values())  # nothing went

    dense = adapted(tiny_model("llama").requires_grad_(False))
    narrow = adapted(pruned("llama")[1])
    linear = decoder_layers(narrow.get_base_model())[0].o
    sides = [seen(side.get_base_model(), 0) for side in (dense, narrow)]
    before = linear.base_layer.weight
    fits = compensate_(narrow, dense, KEPT, calibration(5, TEXT), "sequential")
    assert fits["0.o"].changes
    there, here = (side["hidden"] + side["o out"] for side in sides)
    change = ridge_regression(
        sides[1]["o in"], there - here, 1 / there.square().mean(-1), fits["0.o"].ridge, bias=False
    )
    torch.testing.assert_close(linear.base_layer.weight - before, change.float(), rtol=1e-3, atol=1e-5)
    assert all(torch.equal(p, factors[name]) for name, p in model.named_parameters() if "lora_" in name)


def test_weights_that_are_not_finite_are_refused_by_the_name_of_the_linear() -> None:
    dense, narrow = pruned("llama")
    decoder_layers(dense)[1].down.weight.data[3, 4] = torch.nan
    for how in ("sequential", "local"):
        with pytest.raises(UserError, match=r"reaches 1\.down \(layer.projection\) in compensation is not finite"):
            compensate_(pruned("llama")[1], dense, KEPT, calibration(5, TEXT), how)  # type: ignore[arg-type]


def test_tokens_of_which_nothing_comes_do_not_count() -> None:
    dense = tiny_model("gemma2").requires_grad_(False)
    decoder_layers(dense)[0].o.weight.data.zero_()
    narrow = shared_copy(dense)
    narrow_(narrow, KEPT)
    fits = compensate_(narrow, dense, KEPT, calibration(5, TEXT), "sequential")
    assert not fits["0.o"].changes and any(fit.changes for fit in fits.values())


def test_a_shared_copy_costs_nothing_and_outlives_what_is_done_to_the_other() -> None:
    dense = tiny_model("llama").requires_grad_(False)
    expected = dense(input_ids=TEXT).logits
    narrow = shared_copy(dense)
    pairs = zip(dense.parameters(), narrow.parameters(), strict=True)
    assert all(one is other for one, other in pairs) and narrow.model is not dense.model
    narrow_(narrow, KEPT)
    compensate_(narrow, dense, KEPT, calibration(5, TEXT), "sequential")
    assert torch.equal(dense(input_ids=TEXT).logits, expected)
    assert narrow.model.layers[0].mlp.down_proj.in_features == len(KEPT[0][1])


def test_places_are_counted_among_what_the_earlier_plan_keeps() -> None:
    model = tiny_model("llama")
    first = CompressionPlan.dense(architecture_of(model.config), None).keeping(
        [([0, 2, 3], range(0, FFN, 2))] + [([0, 1], range(FFN))] * (LAYERS - 1)
    )
    later = first.keeping([([1, 2], [0, 3, 5])] + [([1], [7])] * (LAYERS - 1))
    assert places_among(first, later) == [([1, 2], [0, 3, 5])] + [([1], [7])] * (LAYERS - 1)
    turned = first.keeping([([2, 0], [5, 0, 3])] + [([1], [7])] * (LAYERS - 1))
    assert places_among(first, turned)[0] == ([2, 0], [5, 0, 3])
    assert places_among(turned, turned.keeping([([1], [2, 0])] + [([0], [0])] * (LAYERS - 1)))[0] == ([1], [2, 0])


@pytest.mark.parametrize(
    ("sequences", "length", "widest", "needed"), [(192, 128, 18_433, 193), (3, 128, 10, 4), (9, 20, 150, 10)]
)
def test_text_of_fewer_tokens_than_inputs_is_refused(sequences: int, length: int, widest: int, needed: int) -> None:
    with pytest.raises(UserError, match=f"needs as many. Give at least {needed} sequences, or use compensation none"):
        check_text(CalibrationConfig(sequences, length), widest)
    check_text(CalibrationConfig(needed, length), widest)


def test_a_line_says_what_was_done() -> None:
    dense, narrow = pruned("llama")
    fits = compensate_(narrow, dense, KEPT, calibration(5, TEXT), "sequential")
    changed = [fit for fit in fits.values() if fit.changes]
    mean = sum(1 - fit.after / fit.before for fit in changed) / len(changed)
    assert describe(fits, S * T) == (
        f"Compensated {len(changed)} of 6 linears on 480 tokens; what these lacked on held-out text is {mean:.1%} less "
        f"in the mean."
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_dense_model_of_the_same_tensors_stays_as_it_is(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(3, 2).to(dtype)
    weight, bias = linear.weight.data.fill_(2), linear.bias.data.fill_(3)
    add_(linear, Change(torch.full((2, 3), 0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)))
    assert (weight == 2).all() and (bias == 3).all()
    assert (linear.weight == 2.5).all() and (linear.bias == 4).all()
    assert linear.weight.dtype == linear.bias.dtype == dtype
