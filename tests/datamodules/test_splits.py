from collections import Counter

import pytest

from qpruner.datamodules.splits import SplitError, hold_out, make_disjoint
from qpruner.errors import UserError

RECORDS = [f"record {number}" for number in range(2000)]


def test_held_out_splits_share_the_training_records_among_them() -> None:
    splits = hold_out({"train": RECORDS}, str, 0.1)
    assert Counter(sum(splits.values(), [])) == Counter(RECORDS)
    sizes = {split: len(records) for split, records in splits.items()}
    assert sizes["train"] == pytest.approx(1600, abs=80)
    assert sizes["validation"] == pytest.approx(200, abs=60)
    assert sizes["test"] == pytest.approx(200, abs=60)
    assert splits["train"] == [record for record in RECORDS if record in set(splits["train"])]  # in their order


def test_only_what_is_missing_is_held_out() -> None:
    splits = hold_out({"train": RECORDS, "test": ["given"]}, str, 0.1)
    assert splits["test"] == ["given"]
    assert splits["validation"] == hold_out({"train": RECORDS}, str, 0.1)["validation"]
    assert sorted(splits["train"] + splits["validation"]) == sorted(RECORDS)


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({"validation": ["a"]}, 0.1),
        ({"train": ["a"], "validation": ["b"], "test": ["c"]}, 0.1),
        ({"train": ["a"]}, 0.0),
        ({"train": ["a"], "validation": ["b"]}, 0.0),
    ],
)
def test_nothing_to_hold_out(given: dict, share: float) -> None:
    assert hold_out(given, str, share) == given


def test_equal_records_stay_together() -> None:
    splits = hold_out({"train": [f" record {number % 100}\n" * (1 + number % 2) for number in range(1000)]}, str, 0.2)
    sides = [set(records) for records in splits.values()]
    assert all(sides)
    assert sum(map(len, sides)) == len(set.union(*sides)) == 100
    # White space around a record does not make another record of it.
    around = hold_out({"train": RECORDS + [f" {record}\n" for record in RECORDS]}, str, 0.2)
    assert all(set(Counter(map(str.strip, records)).values()) == {2} for records in around.values())


def test_adding_records_moves_none() -> None:
    few, many = hold_out({"train": RECORDS[::2]}, str, 0.1), hold_out({"train": RECORDS}, str, 0.1)
    for split, records in few.items():
        assert set(records) <= set(many[split])


def test_too_few_records_to_hold_any_out() -> None:
    message = (
        r"Holding 5% of 1 training record\(s\) out for validation and test leaves nothing in validation and test\. "
        r"Give these splits files of their own.*--data.init_args.separator.*--data.init_args.held_out 0\."
    )
    with pytest.raises(UserError, match=message):
        hold_out({"train": ["one document"]}, str, 0.05)


def test_a_record_in_several_splits_stays_in_the_last_one() -> None:
    splits, left_out = make_disjoint(
        {"train": ["a", "b", "c", "c", "d", "d"], "validation": [" b\n", "e", "f"], "test": ["f", "c", "g"]}, str
    )
    assert splits == {"train": ["a", "d", "d"], "validation": [" b\n", "e"], "test": ["f", "c", "g"]}
    assert left_out == {"train": 3, "validation": 1, "test": 0}


def test_content_says_what_is_the_same() -> None:
    splits, _ = make_disjoint({"train": [("a", 1), ("b", 2)], "test": [("a", 3)]}, lambda record: record[0])
    assert splits == {"train": [("b", 2)], "test": [("a", 3)]}


def test_nothing_left_of_a_split() -> None:
    reason = (
        r"^Nothing is left of the train split: all its 3 record\(s\) also stand in validation or test\. Give it data"
    )
    with pytest.raises(SplitError, match=reason) as caught:
        make_disjoint({"train": ["a", "a", "c"], "validation": ["a", "b"], "test": ["c"]}, str)
    assert caught.value.splits == ("train", "validation", "test")
