"""Seeds that stay what they are, or resumed runs and published numbers would not repeat."""

from qpruner.seeds import derive_seed


def test_seeds_of_known_meanings_stay() -> None:
    assert derive_seed(0, "batch", 1, 2) == 4526925077996232240
    assert derive_seed() == 8203414616412130826


def test_every_part_its_place_and_its_kind_matter() -> None:
    meanings = [(1, "a"), ("a", 1), ("1", "a"), (1, "a", 0), (1, "b"), (2, "a"), ("1a",), (1,), ("1/'a'",)]
    assert len({derive_seed(*parts) for parts in meanings}) == len(meanings)


def test_seeds_fill_63_bits() -> None:
    seeds = [derive_seed(number) for number in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds) and len({*seeds}) == 1000
    for bit in (0, 20, 62):
        assert 400 < sum(seed >> bit & 1 for seed in seeds) < 600
