"""The loss of every assignment of two widths to the blocks of a model, pruned or not, as it is and after a short
recovery.

    python benchmarks/block_bits.py --base MODEL --train TRAIN.txt --validation VALID.txt --rows rows.jsonl
    python benchmarks/block_bits.py --base qpruner/stories --rows rows.jsonl --lr 3e-4

For six blocks these are 64, few enough to measure all; for more blocks a random sample of equal bytes, half of the
blocks in each width. The rows are the truth that `benchmarks/allocation.py` holds methods of allocation to. A row that
is in the file already is not computed again. ``--methods`` measures beside them what each method would choose for
half of the blocks. With ``--folder`` the bank and the sensitivities are kept for other processes, that share the rows:

    python benchmarks/block_bits.py ... --folder DIR --rows rows.jsonl --methods --prepare
    for i in 1 2 3 4; do python benchmarks/block_bits.py ... --folder DIR --rows rows.jsonl --methods --part $i/4 & done
    wait; cat rows.?-of-4.jsonl >> rows.jsonl
"""

import argparse
from collections.abc import Iterator

from block_sensitivities import sensitivities, with_largest
from block_study import BlockStudy, add_study_arguments, setup_torch
from studies import Row, complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_arguments(parser, steps=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="of the recovery; none to leave it out")
    parser.add_argument("--methods", action="store_true", help="measure the choices of each method, too")
    parser.add_argument("--prepare", action="store_true", help="only fill --folder")
    given = parser.parse_args()
    setup_torch(given)
    study = BlockStudy(given)
    chosen = choices(study) if given.methods else {}
    if not given.prepare:
        complete(given, list(wanted(study, list(chosen.values()))), study.measure)


def wanted(study: BlockStudy, chosen: list[str]) -> Iterator[Row]:
    """First all without recovery, then all with it, seed by seed."""
    given = study.given
    vectors = dict.fromkeys([*study.vectors, *chosen])
    for steps, seed in [(0, 0), *((given.steps, seed) for seed in given.seeds)]:
        for vector in vectors:
            yield study.key(vector, steps, seed, given.lr)


def choices(study: BlockStudy) -> dict[str, str]:
    """The assignment that each method chooses with half of the blocks in the wider width."""
    values = sensitivities(study)
    return {name: with_largest(value, study.num_blocks // 2, study.given.widths) for name, value in values.items()}


if __name__ == "__main__":
    main()
