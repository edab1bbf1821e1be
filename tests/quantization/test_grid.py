import torch

from qpruner.quantization.grid import Grid, GridOfTwo


def grid(scales: list[float], minima: list[float], bits: int, group: int) -> Grid:
    return Grid(torch.tensor([scales]), torch.tensor([minima]), bits, group)


def test_codes_and_values_by_hand_with_a_short_last_group() -> None:
    two_bits = grid([0.5, 2.0], [-1.0, 0.0], 2, 3)
    weight = torch.tensor([[-3.0, -0.7, 9.0, 1.1, 6.9]])
    codes = two_bits.round(weight)
    assert codes.tolist() == [[0, 1, 3, 1, 3]] and codes.dtype == torch.uint8
    assert two_bits.values(codes).tolist() == [[-1.0, -0.5, 0.5, 2.0, 6.0]]


def test_some_columns_are_rounded_as_among_all() -> None:
    torch.manual_seed(0)
    random = Grid(torch.rand(4, 3), torch.randn(4, 3), 3, 5)
    weight = torch.randn(4, 13)
    codes = random.round(weight)
    for first, end in ((0, 1), (4, 6), (7, 13)):
        assert torch.equal(random.round(weight[:, first:end], first), codes[:, first:end])
        assert torch.equal(random.values(codes[:, first:end], first), random.values(codes)[:, first:end])


def test_each_weight_gets_the_nearest_value_also_where_scales_are_negative() -> None:
    torch.manual_seed(0)
    random = Grid(torch.randn(4, 2), torch.randn(4, 2), 3, 8)
    weight = torch.randn(4, 16) * 3
    values = torch.stack([random.values(torch.full((4, 16), code, dtype=torch.uint8)) for code in range(8)])
    nearest = (values - weight).abs().min(dim=0).values
    torch.testing.assert_close((random.values(random.round(weight)) - weight).abs(), nearest)


def test_a_group_of_one_value_and_scales_too_small_to_divide_by() -> None:
    for scale in (0.0, 1e-42):
        flat = grid([scale], [0.25], 4, -1)
        codes = flat.round(torch.tensor([[0.25, 0.25, 7.0]]))
        assert codes.tolist() == [[0, 0, 0]] and flat.values(codes).tolist() == [[0.25] * 3]


def test_of_two_values_as_near_the_higher_code_is_taken() -> None:
    assert grid([1.0], [0.0], 2, -1).round(torch.tensor([[0.5, 1.5, 2.5]])).tolist() == [[1, 2, 3]]


def test_grids_side_by_side_are_one() -> None:
    torch.manual_seed(0)
    leading, rest = Grid(torch.rand(4, 2), torch.randn(4, 2), 3, 4), Grid(torch.rand(4, 3), torch.randn(4, 3), 2, 5)
    two = GridOfTwo(leading, 6, rest)
    weight = torch.randn(4, 18)
    codes = two.round(weight)
    assert torch.equal(codes, torch.cat([leading.round(weight[:, :6]), rest.round(weight[:, 6:])], 1))
    assert torch.equal(two.values(codes), torch.cat([leading.values(codes[:, :6]), rest.values(codes[:, 6:])], 1))
    assert two.scales.shape == two.minima.shape == (4, 5) and two.levels.tolist() == [8, 8, 4, 4, 4]
    for part, rows in zip(two.cut(3), ([0, 1], [2], [3]), strict=True):
        assert torch.equal(part.values(codes[rows]), two.values(codes)[rows])
    other = two.on(2 * two.scales, two.minima + 1)
    assert torch.equal(other.scales, 2 * two.scales) and torch.equal(other.minima, two.minima + 1)
    groups = [slice(0, 4), slice(4, 6), slice(6, 11), slice(11, 16), slice(16, 18)]
    torch.testing.assert_close(two.sums(weight), torch.stack([weight[:, group].sum(1) for group in groups], 1))


def test_sums_over_whole_rows_and_short_groups_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    assert grid([1.0], [0.0], 2, -1).sums(values).tolist() == [[6.0], [1.0]]
    assert grid([1.0], [0.0], 2, 2).sums(values).tolist() == [[3.0, 3.0], [1.0, 0.0]]
