"""Calibrated rounding: what its options have to do with each other, and what it is judged by."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from support.grids import HalfGrid, choose_grid, correlated
from support.linears import meant_by
from torch import Tensor

from qpruner.errors import UserError
from qpruner.plan import ROW, Leading, Precision
from qpruner.quantization.formats import GridFormat, format_for
from qpruner.quantization.grid_search import GridSearch
from qpruner.quantization.rounding import RoundingConfig, corrected_weight, error, round_weight
from qpruner.quantization.uniform import Uniform

PRECISION = Precision("half", 3, 32)


def drawn(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.1


def hessian_of(columns: int, seed: int = 0) -> Tensor:
    inputs = correlated(3 * columns, columns, seed)
    return inputs.T @ inputs


def test_nearest_is_plain_rounding() -> None:
    weight = drawn(9, 70)
    config = RoundingConfig(method="nearest", grid="minmax")
    rounded = round_weight(weight, HalfGrid(), PRECISION, hessian_of(70), config)
    grid = choose_grid(weight, HalfGrid(), PRECISION, "minmax")
    assert torch.equal(rounded.codes, grid.round(weight))
    assert torch.equal(rounded.values, grid.values(grid.round(weight)))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("grid", ["mse", "neuqi"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_gptq_is_never_worse_than_nearest_on_the_calibration_text(grid: GridSearch, bits: int, act_order: bool) -> None:
    precision = Precision("half", bits, 32)
    for seed in range(5):
        weight, hessian = drawn(24, 96, seed), hessian_of(96, seed)
        config = RoundingConfig(grid=grid, act_order=act_order)
        calibrated, nearest = (
            error(weight, round_weight(weight, HalfGrid(), precision, hessian, one).values, hessian)
            for one in (config, replace(config, method="nearest"))
        )
        assert calibrated < nearest


@pytest.mark.parametrize("grid", ["mse", "neuqi"])
def test_searches_are_weighted_by_what_inputs_are(grid: GridSearch) -> None:
    weight, hessian = drawn(9, 64), hessian_of(64)
    config = RoundingConfig(method="nearest", grid=grid, damping=1e-6)
    rounded = round_weight(weight, HalfGrid(), PRECISION, hessian, config)
    weighted = choose_grid(weight, HalfGrid(), PRECISION, grid, hessian.diagonal())
    assert torch.allclose(rounded.grid.scales, weighted.scales, rtol=1e-2)
    assert not torch.allclose(rounded.grid.scales, choose_grid(weight, HalfGrid(), PRECISION, grid).scales, rtol=1e-2)


@pytest.mark.parametrize("method", ["nearest", "gptq"])
@pytest.mark.parametrize("act_order", [False, True])
def test_each_group_of_rows_is_as_if_it_were_alone(method: str, act_order: bool) -> None:
    weight, hessians = drawn(11, 70), torch.stack([hessian_of(70, seed) for seed in range(3)])
    config = RoundingConfig(method=method, act_order=act_order)  # type: ignore[arg-type]
    whole = round_weight(weight, HalfGrid(), PRECISION, hessians, config)
    left = 0.0
    for part, hessian, values in zip(weight.tensor_split(3), hessians, whole.values.tensor_split(3), strict=True):
        assert torch.equal(round_weight(part, HalfGrid(), PRECISION, hessian, config).values, values)
        left += error(part, values, hessian)
    assert error(weight, whole.values, hessians) == pytest.approx(left)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_format_whose_scales_depend_on_each_other(act_order: bool) -> None:
    """The grid is one that it stores, and codes were made for that one."""
    weight, hessian, store = drawn(16, 96), hessian_of(96), HalfGrid(shared=True)
    config = RoundingConfig(act_order=act_order)
    rounded = round_weight(weight, store, PRECISION, hessian, config)
    again = store.storable(rounded.grid.scales, rounded.grid.minima, PRECISION)
    assert torch.allclose(again.scales, rounded.grid.scales, rtol=1e-5)
    apart = round_weight(weight, HalfGrid(), PRECISION, hessian, config)
    assert error(weight, rounded.values, hessian) < 1.1 * error(weight, apart.values, hessian)


FORMATS = [Uniform(symmetric, double) for symmetric in (False, True) for double in (False, True)]


@pytest.mark.parametrize("number_format", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("group", [32, ROW])
@pytest.mark.parametrize("act_order", [False, True])
def test_formats_pack_what_was_rounded(number_format: Uniform, group: int, act_order: bool) -> None:
    weight, hessian, precision = drawn(24, 100), hessian_of(100), Precision(number_format.name, 3, group)
    config = RoundingConfig(act_order=act_order)
    calibrated, nearest = (
        round_weight(weight, number_format, precision, hessian, one)
        for one in (config, replace(config, method="nearest"))
    )
    assert error(weight, calibrated.values, hessian) < 0.9 * error(weight, nearest.values, hessian)
    packed = number_format.pack(calibrated.codes, calibrated.grid)
    assert torch.equal(meant_by(packed, (24, 100), precision), calibrated.values)


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_channels_are_rounded_to_nearest_and_change_nothing(act_order: bool) -> None:
    weight, hessian = drawn(16, 64), hessian_of(64)
    hessian[:, 5] = hessian[5] = 0
    config = RoundingConfig(grid="minmax", act_order=act_order, refinements=0)
    rounded = round_weight(weight, HalfGrid(), Precision("half", 3, 64), hessian, config)
    assert torch.equal(rounded.codes[:, 5], rounded.grid.round(weight)[:, 5])
    moved = weight.clone()
    moved[:, 5] *= 0.5  # within the range, so that the grid stays
    other = round_weight(moved, HalfGrid(), Precision("half", 3, 64), hessian, config)
    others = [column for column in range(64) if column != 5]
    assert torch.equal(other.codes[:, others], rounded.codes[:, others])
    none = round_weight(weight, HalfGrid(), PRECISION, torch.zeros(64, 64), config)
    assert torch.equal(none.codes, none.grid.round(weight))


def test_rounding_aims_at_dense_outputs_by_least_squares() -> None:
    """At alpha 1 the weight that brute force fits to X W^T on Xq; below, as far on the straight way there."""
    weight = drawn(8, 20).double()
    dense, seen = correlated(300, 20), correlated(300, 20)
    seen = seen + 0.3 * seen.roll(1, 1) + 0.05 * torch.randn(300, 20, generator=torch.Generator().manual_seed(3))
    hessian, cross = seen.T @ seen, dense.T @ seen
    fitted = torch.linalg.lstsq(seen, dense @ weight.T).solution.T
    whole = corrected_weight(weight, hessian, cross, 1.0, 1e-9)
    assert torch.allclose(whole.double(), fitted, atol=1e-5)
    assert torch.equal(corrected_weight(weight, hessian, cross, 0.0, 0.01), weight.float())
    half = corrected_weight(weight, hessian, cross, 0.5, 1e-9)
    assert torch.allclose(half.double(), (weight + fitted) / 2, atol=1e-5)
    assert torch.allclose(corrected_weight(weight, hessian, hessian, 1.0, 0.01).double(), weight, atol=1e-6)
    rows = corrected_weight(weight, torch.stack([hessian, 4 * hessian]), torch.stack([cross, cross]), 1.0, 1e-9)
    assert torch.allclose(rows[:4].double(), fitted[:4], atol=1e-5)
    assert torch.allclose(rows[4:].double(), fitted[4:] / 4, atol=1e-5)


def test_correction_pays_at_the_outputs() -> None:
    weight, dense = drawn(24, 64), correlated(400, 64)
    seen = dense + 0.2 * dense.roll(1, 1)
    hessian, cross, gram = seen.T @ seen, dense.T @ seen, dense.T @ dense
    left = []
    for alpha in (0.0, 0.5, 1.0):
        target = corrected_weight(weight, hessian, cross, alpha, 0.01)
        values = round_weight(target, HalfGrid(), PRECISION, hessian, RoundingConfig()).values
        left.append(error(weight, values, hessian, cross, gram))
    assert left[2] < left[1] < left[0]


def test_the_error_is_that_of_outputs() -> None:
    weight, values = drawn(8, 20).double(), drawn(8, 20, seed=2).double()
    dense, seen = correlated(300, 20), correlated(300, 20, seed=1)
    plain = error(weight, values, seen.T @ seen)
    assert plain == pytest.approx(float((seen @ (weight - values).T).square().sum()), rel=1e-6)
    whole = error(weight, values, seen.T @ seen, dense.T @ seen, dense.T @ dense)
    assert whole == pytest.approx(float((dense @ weight.T - seen @ values.T).square().sum()), rel=1e-6)


def test_what_is_not_finite() -> None:
    weight, hessian = drawn(4, 32), hessian_of(32)
    with pytest.raises(UserError, match="weight of layers.3.q holds values that are not finite"):
        round_weight(weight / 0, HalfGrid(), PRECISION, hessian, RoundingConfig(), name="layers.3.q")
    with pytest.raises(UserError, match="What reaches layers.3.q .* Use --model.dtype bfloat16 or float32"):
        round_weight(weight, HalfGrid(), PRECISION, hessian * torch.nan, RoundingConfig(), name="layers.3.q")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("method", "rtn", "one of nearest, gptq"),
        ("grid", "max", f"one of {', '.join(get_args(GridSearch))}"),
        ("damping", 0.0, "above 0 and at most 1"),
        ("damping", float("nan"), "above 0 and at most 1"),
        ("alpha", 1.5, "from 0 to 1"),
        ("refinements", -1, "at least 0"),
        ("first_order", 1.0, "from 0 to below 1"),
    ],
)
def test_options_have_ranges(option: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError, match=f"rounding.{option} is {value}; it must be {allowed}."):
        RoundingConfig(**{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_refinement_leaves_less_on_a_grid_that_the_format_stores(act_order: bool, shared: bool) -> None:
    weight, hessian, store = drawn(24, 96), hessian_of(96), HalfGrid(shared=shared)
    left = []
    for refinements in (0, 1, 3):
        config = RoundingConfig(act_order=act_order, refinements=refinements)
        rounded = round_weight(weight, store, PRECISION, hessian, config)
        assert torch.allclose(
            store.storable(rounded.grid.scales, rounded.grid.minima, PRECISION).scales, rounded.grid.scales, rtol=1e-5
        )
        left.append(error(weight, rounded.values, hessian))
    assert left[1] < 0.97 * left[0] and left[2] < left[1]


# Two segments.

TWO = [
    Precision("affine", 2, 32, Leading(20, Precision("affine", 4, 64))),
    Precision("affine-double", 2, 32, Leading(20, Precision("symmetric", 6, 32))),
    Precision("symmetric", 3, 64, Leading(70, Precision("affine-double", 4, ROW))),
]


def grid_format(precision: Precision) -> GridFormat:
    number_format = format_for(precision)
    assert isinstance(number_format, GridFormat)
    return number_format


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["affine", "symmetric"])
def test_two_segments_of_one_precision_give_the_codes_of_one_segment(name: str, act_order: bool) -> None:
    """64 weights a group is what the format takes where none is said."""
    one = Precision(name, 3, 64)
    two = Precision(name, 3, None, Leading(128, one))
    weight, hessians = drawn(24, 300), torch.stack([hessian_of(300, 0), hessian_of(300, 1)])
    config = RoundingConfig(act_order=act_order, first_order=0.01)
    whole, parts = (round_weight(weight, grid_format(each), each, hessians, config) for each in (one, two))
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.grid.scales, whole.grid.scales) and torch.equal(parts.grid.minima, whole.grid.minima)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("precision", TWO, ids=str)
def test_two_segments_are_never_worse_than_nearest_and_stored_as_rounded(precision: Precision, act_order: bool) -> None:
    number_format = grid_format(precision)
    for seed in range(3):
        weight, hessian = drawn(24, 150, seed), hessian_of(150, seed)
        config = RoundingConfig(act_order=act_order)
        rounded = round_weight(weight, number_format, precision, hessian, config)
        plain = meant_by(number_format.encode(weight, precision), (24, 150), precision)
        nearest = round_weight(weight, number_format, precision, hessian, replace(config, method="nearest"))
        assert error(weight, rounded.values, hessian) < error(weight, nearest.values, hessian)
        assert error(weight, nearest.values, hessian) < error(weight, plain, hessian)
        state = number_format.pack(rounded.codes, rounded.grid)
        assert torch.equal(meant_by(state, (24, 150), precision), rounded.values)
        assert torch.equal(number_format.codes(state, 150, precision), rounded.codes)


def test_the_rest_makes_up_for_the_leading_segment() -> None:
    """Rounding each segment by its own part of the Hessian leaves more."""
    precision = TWO[0]
    weight, hessian = drawn(24, 150), hessian_of(150)
    whole = round_weight(weight, grid_format(precision), precision, hessian, RoundingConfig())
    parts = []
    for columns, each in ((slice(0, 20), Precision("affine", 4, 64)), (slice(20, 150), precision.rest)):
        alone = hessian[columns, columns]
        parts.append(round_weight(weight[:, columns], grid_format(each), each, alone, RoundingConfig()).values)
    assert error(weight, whole.values, hessian) < 0.9 * error(weight, torch.cat(parts, 1), hessian)


def test_more_bits_for_the_leading_columns_leave_less() -> None:
    weight, hessian = drawn(24, 150), hessian_of(150)
    left = [
        error(weight, round_weight(weight, grid_format(each), each, hessian, RoundingConfig()).values, hessian)
        for each in (TWO[0].rest, TWO[0])
    ]
    assert left[1] < 0.95 * left[0]
