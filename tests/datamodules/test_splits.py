import pytest

from qpruner.datamodules.splits import SPLITS, hold_out, make_disjoint
from qpruner.errors import UserError

WORDS = [f"record {number}" for number in range(2000)]


def test_missing_splits_are_filled_and_nothing_is_lost() -> None:
    splits = hold_out({"train": WORDS}, str, 0.1)
    assert sorted(word for split in SPLITS for word in splits[split]) == sorted(WORDS)
    assert 140 < len(splits["validation"]) < 260
    assert 140 < len(splits["test"]) < 260


def test_equal_records_stay_together_and_others_stay_where_they_are() -> None:
    once = hold_out({"train": WORDS}, str, 0.2)
    more = hold_out({"train": [*WORDS, *reversed(WORDS), *(f"new {n}" for n in range(50))]}, str, 0.2)
    for split in SPLITS:
        assert set(once[split]) <= set(more[split])
    assert not set(more["train"]) & set(more["validation"]) | set(more["validation"]) & set(more["test"])


def test_only_what_is_missing_is_held_out() -> None:
    given = {"train": WORDS, "test": ["a", "b"]}
    splits = hold_out(given, str, 0.1)  # type: ignore[arg-type]
    assert splits["test"] == ["a", "b"]
    assert set(splits["validation"]) == set(hold_out({"train": WORDS}, str, 0.1)["validation"])
    assert hold_out({"test": ["a"]}, str, 0.1) == {"test": ["a"]}
    assert hold_out({"train": WORDS}, str, 0.0) == {"train": WORDS}


def test_too_few_records_to_hold_any_out() -> None:
    with pytest.raises(UserError, match=r"Holding 5% of 1 training record\(s\) out.*separator.*held_out 0"):
        hold_out({"train": ["one"]}, str, 0.05)


def test_what_stands_in_a_later_split_is_taken_from_the_earlier() -> None:
    given = {"train": ["a", "b ", "c", "a"], "validation": ["b", "d"], "test": ["d", "e", "e"]}
    kept, removed = make_disjoint(given, str)  # type: ignore[arg-type]
    assert kept == {"test": ["d", "e", "e"], "validation": ["b"], "train": ["a", "c", "a"]}
    assert removed == {"test": 0, "validation": 1, "train": 1}


def test_a_split_of_which_nothing_is_left_is_an_error() -> None:
    with pytest.raises(UserError, match="Nothing is left of the validation split: all its 1 record"):
        make_disjoint({"train": ["a"], "validation": ["b"], "test": ["b"]}, str)
