"""Three splits, disjoint by content: train to fit and calibrate, validation to choose, test to report."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, TypeVar

from qpruner.errors import UserError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
T = TypeVar("T")


class SplitError(UserError):
    """A mistake that would not be one without some of the splits.

    Args:
        message: message for the user.
        splits: splits any of which may be at fault.
    """

    def __init__(self, message: str, *splits: Split) -> None:
        super().__init__(message)
        self.splits = splits


@contextmanager
def at_fault(split: Split) -> Iterator[None]:
    """Attributes a user's mistake to this split."""
    try:
        yield
    except UserError as error:
        raise SplitError(str(error), split) from error


def hold_out(given: Mapping[Split, Sequence[T]], content: Callable[[T], str], share: float) -> dict[Split, list[T]]:
    """Fills missing validation and test splits from the training split.

    The hash of its content decides on a record, so equal records stay together and adding records moves none.

    Args:
        given: records of the splits that the user named.
        content: function that gives the text by which records are compared.
        share: share of the training records for each missing split, in [0, 0.5); at 0 they stay missing.

    Raises:
        UserError: a split is missing and the training split has too few records to fill it.
    """
    splits: dict[Split, list[T]] = {split: list(records) for split, records in given.items()}
    missing = [split for split in SPLITS[1:] if split not in given]
    if not missing or "train" not in given or share == 0:
        return splits
    kept: list[T] = []
    splits |= {split: [] for split in missing}
    for record in given["train"]:
        place = int.from_bytes(_digest(content(record))[:8], "big") / 2**64
        drawer = int(place / share)
        (splits[missing[drawer]] if drawer < len(missing) else kept).append(record)
    splits["train"] = kept
    if empty := [split for split in ("train", *missing) if not splits[split]]:
        raise UserError(
            f"Holding {share:.0%} of {len(given['train'])} training record(s) out for {' and '.join(missing)} leaves "
            f"nothing in {' and '.join(empty)}. Give these splits files of their own, give more records (a text file "
            f"without --data.init_args.separator is one), or do without these splits: --data.init_args.held_out 0."
        )
    return splits


def make_disjoint(
    splits: Mapping[Split, Sequence[T]], content: Callable[[T], str]
) -> tuple[dict[Split, list[T]], dict[Split, int]]:
    """Removes from train what is in validation or test, and from validation what is in test; also counts these.

    Raises:
        SplitError: nothing is left of a split.
    """
    seen: dict[bytes, Split] = {}
    kept: dict[Split, list[T]] = {}
    for split in reversed(SPLITS):
        if split in splits:
            digests = [_digest(content(record)) for record in splits[split]]
            kept[split] = [record for record, digest in zip(splits[split], digests, strict=True) if digest not in seen]
            if splits[split] and not kept[split]:
                later = [other for other in SPLITS if other in {seen[digest] for digest in digests}]
                raise SplitError(
                    f"Nothing is left of the {split} split: all its {len(digests):,} record(s) also stand in "
                    f"{' or '.join(later)}. Give it data of its own.",
                    split,
                    *later,
                )
            seen.update(dict.fromkeys(digests, split))
    return kept, {split: len(splits[split]) - len(records) for split, records in kept.items()}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.strip().encode("utf-8", "surrogatepass")).digest()
