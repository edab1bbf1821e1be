"""Least squares from sums, against brute force on the tokens themselves."""

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from qpruner.calibration.regression import RIDGES, Change, Fit, Sums, fit_
from qpruner.offload import Offload, _mapped_from_files

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


@pytest.mark.parametrize(("offset", "changes"), [(3e3, True), (1e4, False)])
def test_inputs_that_hardly_differ_take_a_larger_ridge_or_no_change(offset: float, changes: bool) -> None:
    """Far from zero, float32 holds less of what inputs differ by than the smallest ridge adds, and at last nothing."""
    sums, held_out = (summed(*draw(seed, offset=offset)) for seed in (1, 2))
    small = [sums.change(ridge, bias=True) for ridge in RIDGES]
    assert small[0] is None and (small[-1] is not None) == changes
    before = float(held_out.squares / held_out.size)
    change, best = fit_(sums, held_out, bias=True)
    assert (change is not None) == best.changes
    assert best.after < before if best.changes else best.after == before


def test_held_out_tokens_that_spoil_the_sums_leave_the_linear_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ridge that is large enough without the held-out tokens may be too small once they are added."""
    sums, held_out = summed(*draw(1)), summed(*draw(2))
    alone, change = float(sums.tokens), Sums.change
    assert fit_(summed(*draw(1)), held_out, bias=True)[1].changes
    monkeypatch.setattr(
        Sums, "change", lambda self, *args, **given: change(self, *args, **given) if self.tokens <= alone else None
    )
    before = float(held_out.squares / held_out.size)
    assert fit_(sums, held_out, bias=True) == (None, Fit(0.0, before, before))


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
    first, second = (summed(*(tensor[part] for tensor in tokens)) for part in (slice(0, 20), slice(20, None)))
    first.merge_(second)
    for whole, added in zip(summed(*tokens).tensors, first.tensors, strict=True):
        torch.testing.assert_close(whole, added, rtol=1e-6, atol=1e-5)


def test_the_ridge_is_the_best_on_held_out_tokens_and_the_change_is_made_from_all() -> None:
    sums, held_out = summed(*draw(1, noise=2.0)), summed(*draw(2, noise=2.0))
    errors = [held_out.error(sums.change(ridge, bias=False)) for ridge in RIDGES]
    change, best = fit_(sums, held_out, bias=False)
    assert best.after == min(errors) and best.ridge == RIDGES[errors.index(min(errors))]
    assert best.before == pytest.approx(float(draw(2, noise=2.0)[1].square().mul(draw(2)[2].unsqueeze(1)).sum()
                                              / (draw(2)[2].sum() * OUTPUTS)), rel=1e-5)  # fmt: skip
    everything = summed(*draw(1, noise=2.0))
    everything.merge_(held_out)
    assert change is not None and best.changes
    assert torch.equal(change.weight, everything.change(best.ridge, bias=False).weight)


@pytest.mark.parametrize("bias", [False, True])
def test_held_out_sums_that_lie_in_files_give_the_same_and_leave_no_file(tmp_path: Path, bias: bool) -> None:
    def fitted(offload: Offload | None) -> tuple[Change | None, Fit]:
        return fit_(summed(*draw(1)), summed(*draw(2)), bias=bias, offload=offload)

    mapped = Path("/proc/self/maps").read_text().count(".offload-")
    (lying, told), (change, best) = fitted(Offload(tmp_path)), fitted(None)
    assert told == best and best.changes and lying is not None and change is not None
    assert torch.equal(lying.weight, change.weight)
    if bias:
        assert lying.bias is not None and change.bias is not None and torch.equal(lying.bias, change.bias)
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/maps").read_text().count(".offload-") == mapped


def test_held_out_sums_lie_in_files_while_a_change_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums, held_out = summed(*draw(1)), summed(*draw(2))
    start, where = held_out.gram.data_ptr(), []
    change = Sums.change

    def spy(self: Sums, ridge: float, *, bias: bool) -> Change:
        where.append(_mapped_from(held_out.gram.data_ptr()))
        return change(self, ridge, bias=bias)

    assert not _mapped_from(start)
    monkeypatch.setattr(Sums, "change", spy)
    fit_(sums, held_out, bias=False, offload=Offload(tmp_path))
    assert where == [True] * (len(RIDGES) + 1)


def _mapped_from(address: int) -> bool:
    return any(start <= address < end for start, end in _mapped_from_files())


WIDE, NARROW = 600, 100


def wide_sums() -> Sums:
    sums = Sums.none(WIDE, NARROW, torch.device("cpu"))
    sums.add_(torch.randn(700, WIDE), torch.randn(700, NARROW), torch.ones(700))
    return sums


def most_taken(work: Callable[[], object]) -> float:
    """Bytes that a piece of work holds at most above what there was, in those of sums."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    recorded: Any = profiled.profiler
    taken = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    assert kept is not None and taken
    return max(accumulate(taken)) / (8 * WIDE * (WIDE + NARROW))


def test_a_change_takes_no_more_than_the_factor_and_itself() -> None:
    """What LAPACK would copy for itself, another matrix of the size of the sums, is spared."""
    sums = wide_sums()
    assert most_taken(lambda: sums.change(0.1, bias=False)) == pytest.approx(1, abs=0.05)


def test_a_fit_takes_no_more_than_a_change() -> None:
    sums, held_out = wide_sums(), wide_sums()
    assert most_taken(lambda: fit_(sums, held_out, bias=False)) == pytest.approx(1, abs=0.05)


def test_nothing_is_changed_where_held_out_tokens_say_the_opposite() -> None:
    inputs, missing, weights = draw(1)
    sums, opposite = summed(inputs, missing, weights), summed(inputs, -missing, weights)
    change, best = fit_(sums, opposite, bias=False)
    assert change is None and not best.changes
    assert best.before == best.after == pytest.approx(opposite.error(sums.change(1e9, bias=False)), rel=1e-6)


def test_nothing_is_changed_where_nothing_is_missing() -> None:
    inputs, missing, weights = draw(1)
    sums = summed(inputs, torch.zeros_like(missing), weights)
    assert fit_(sums, sums, bias=True)[0] is None


def test_a_dead_input_is_no_trouble() -> None:
    inputs, missing, weights = draw(1)
    inputs[:, 2] = 0
    change, _ = fit_(summed(inputs, missing, weights), summed(inputs, missing, weights), bias=False)
    assert change is not None
    assert float(change.weight[:, 2].abs().max()) < 1e-9
    everything_dead = summed(torch.zeros_like(inputs), missing, weights)
    assert fit_(everything_dead, everything_dead, bias=False)[0] is None
