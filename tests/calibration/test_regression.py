"""Least squares from sums, against brute force on the tokens themselves."""

import pytest
import torch
from torch import Tensor

from qpruner.calibration.regression import RIDGES, Sums, fit

TOKENS, INPUTS, OUTPUTS = 60, 7, 5


def draw(seed: int, noise: float = 0.3, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what outputs lack, and weights of tokens; the same law at every seed."""
    law = torch.Generator().manual_seed(0)
    true = torch.randn(OUTPUTS, INPUTS, generator=law, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(TOKENS, INPUTS, generator=generator) + offset
    missing = inputs @ true.T.float() + noise * torch.randn(TOKENS, OUTPUTS, generator=generator) + offset
    return inputs, missing, torch.rand(TOKENS, generator=generator) + 0.5


def summed(*tokens: Tensor, pieces: int = 1) -> Sums:
    sums = Sums.none(INPUTS, OUTPUTS, torch.device("cpu"))
    for piece in zip(*(tensor.chunk(pieces) for tensor in tokens), strict=True):
        sums.add_(*piece)
    return sums


def brute_force(inputs: Tensor, missing: Tensor, weights: Tensor, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor]:
    """Least squares on rows: those of the tokens, and one more for each input that asks its weight to be 0."""
    x, e, w = inputs.double(), missing.double(), weights.double().unsqueeze(1)
    mean_x, mean_e = ((w * t).sum(0) / w.sum() * bias for t in (x, e))
    rows, wanted = w.sqrt() * (x - mean_x), w.sqrt() * (e - mean_e)
    damping = (ridge * rows.square().sum(0).mean()).sqrt() * torch.eye(INPUTS, dtype=torch.float64)
    rows, wanted = torch.cat([rows, damping]), torch.cat([wanted, torch.zeros(INPUTS, OUTPUTS, dtype=torch.float64)])
    weight = torch.linalg.lstsq(rows, wanted).solution.T
    return weight, mean_e - weight @ mean_x


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", RIDGES)
def test_the_change_is_that_of_brute_force(ridge: float, bias: bool) -> None:
    tokens = draw(1, offset=0.4)
    weight, offset = brute_force(*tokens, ridge, bias=bias)
    change = summed(*tokens).change(ridge, bias=bias)
    torch.testing.assert_close(change.weight, weight, rtol=1e-5, atol=1e-6)
    if bias:
        assert change.bias is not None
        torch.testing.assert_close(change.bias, offset, rtol=1e-5, atol=1e-5)
    else:
        assert change.bias is None


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_the_mean_square_that_is_left(bias: bool) -> None:
    inputs, missing, weights = draw(2, offset=0.4)
    change = summed(*draw(1, offset=0.4)).change(0.1, bias=bias)
    left = missing - inputs @ change.weight.T.float() - (0 if change.bias is None else change.bias.float())
    expected = float((weights.unsqueeze(1) * left.square()).sum() / (weights.sum() * OUTPUTS))
    assert summed(inputs, missing, weights).error(change) == pytest.approx(expected, rel=1e-5)


def test_sums_do_not_depend_on_how_tokens_are_cut() -> None:
    tokens = draw(1)
    for whole, cut in zip(summed(*tokens).tensors, summed(*tokens, pieces=4).tensors, strict=True):
        torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-5)
    first, second = ([tensor[part] for tensor in tokens] for part in (slice(0, 20), slice(20, None)))
    for whole, added in zip(summed(*tokens).tensors, (summed(*first) + summed(*second)).tensors, strict=True):
        torch.testing.assert_close(whole, added, rtol=1e-6, atol=1e-5)


def test_the_ridge_is_the_best_on_held_out_tokens_and_the_change_is_made_from_all() -> None:
    sums, held_out = summed(*draw(1, noise=2.0)), summed(*draw(2, noise=2.0))
    best = fit(sums, held_out, bias=False)
    errors = [held_out.error(sums.change(ridge, bias=False)) for ridge in RIDGES]
    assert best.after == min(errors) and best.ridge == RIDGES[errors.index(min(errors))]
    assert best.before == pytest.approx(float(draw(2, noise=2.0)[1].square().mul(draw(2)[2].unsqueeze(1)).sum()
                                              / (draw(2)[2].sum() * OUTPUTS)), rel=1e-5)  # fmt: skip
    assert best.change is not None
    assert torch.equal(best.change.weight, (sums + held_out).change(best.ridge, bias=False).weight)


def test_nothing_is_changed_where_held_out_tokens_say_the_opposite() -> None:
    inputs, missing, weights = draw(1)
    sums, opposite = summed(inputs, missing, weights), summed(inputs, -missing, weights)
    best = fit(sums, opposite, bias=False)
    assert best.change is None and best.ridge == 0
    assert best.before == best.after == pytest.approx(opposite.error(sums.change(1e9, bias=False)), rel=1e-6)


def test_nothing_is_changed_where_nothing_is_missing() -> None:
    inputs, missing, weights = draw(1)
    sums = summed(inputs, torch.zeros_like(missing), weights)
    assert fit(sums, sums, bias=True).change is None


def test_a_dead_input_is_no_trouble() -> None:
    inputs, missing, weights = draw(1)
    inputs[:, 2] = 0
    best = fit(summed(inputs, missing, weights), summed(inputs, missing, weights), bias=False)
    assert best.change is not None
    assert float(best.change.weight[:, 2].abs().max()) < 1e-9
    everything_dead = summed(torch.zeros_like(inputs), missing, weights)
    assert fit(everything_dead, everything_dead, bias=False).change is None
