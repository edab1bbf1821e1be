"""How structure and precision are learned together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qpruner.allocation.budget import Budget
from qpruner.errors import UserError, check_ranges
from qpruner.joint.gates import Estimator


@dataclass(frozen=True)
class JointConfig:
    """Learns which units stay and which width each has, by gates on the frozen dense model, before a run's first fit.

    What may be decided is read off the callbacks of the run: ``StructuredPruning`` says that units may go, which layers
    are left alone and what widths are multiples of; ``MixedPrecisionQuantization`` has the budget, the widths
    (``deciding.widths``) and their number formats. The plan that is learned takes their place: it is carried out, with
    the compensation and the rounding by text that they ask for, and recovered. So the variants of the paper are

    - structure and precision (TOGA): both callbacks;
    - precision alone (TOGA-q): no ``StructuredPruning``, and ``lifts: true``;
    - a fixed share of pruned parameters (TOGA-fixed-sparsity): ``fixed_ratio: true``, and the ratio of
      ``StructuredPruning``;
    - structure alone: one width in ``deciding.widths``.

    ```yaml
    joint: {steps: 200}
    trainer:
      callbacks:
        - class_path: StructuredPruning
          init_args: {ratio: 0.2}
        - class_path: MixedPrecisionQuantization
          init_args: {budget: {share: 0.15}, deciding: {widths: [2, 3, 4]}, calibrated: {}}
    ```

    Sources: La et al. 2026 (arXiv:2606.07819), as far as it is known; Gao et al. 2024, DISP-LLM (arXiv:2410.11988);
    GRASPrune (arXiv:2604.19398). `qpruner.joint` says what is whose.

    Args:
        steps: optimizer steps in which gates are learned, each on a batch of the training split; at least 1. Of the
            states on the way, at the start and after each tenth, the best on the ``start_rows`` is taken.
        gates: ``plain``, a parameter for each gate; ``layers``, one for all KV groups and one for all FFN channels of a
            layer, whose order stays that of the start; ``hypernetwork``, a small recurrent network emits all of them.
        constraint: ``projection``, every step opens as many gates as the budget allows; ``penalty``, gates are drawn to
            the budget by ``penalty * |log(bytes / budget)|`` in the loss, and projected at the end.
        penalty: weight of that term, above 0.
        loss: ``kl``, divergence of the compressed model's predictions from the dense model's; ``cross_entropy``, of the
            text, which spares the forward pass of the dense model.
        lr: learning rate of AdamW, above 0, which falls evenly to 0; by default 0.02, and 0.001 for a
            hypernetwork.
        temperature: temperature of the noise by which gates are sampled in training, in units of a logit, above 0; it
            falls evenly to a tenth.
        estimator: slope by which gates learn: ``reinmax``, right for losses that are quadratic between open and closed;
            ``straight_through``, that of a Gumbel-sigmoid.
        lifts: whether input channels of a linear may be held in the widest precision while the others have that of
            their unit; channels are then reordered so that the former come first.
        fixed_ratio: whether as many parameters are pruned as ``StructuredPruning.ratio`` says, and only where is
            learned.
        start_rows: number of training rows by whose Fisher information gates begin, and by whose loss their states are
            compared, at least 1: those that an epoch reads last, so that steps fewer than an epoch has do not learn
            from them. A split of fewer rows gives all.
        further_budgets: budgets that the same gates learn plans for, in turns; only with a hypernetwork, which is told
            the budget.

    Raises:
        UserError: a value out of its range, or further budgets with plain gates.
    """

    steps: int = 200
    gates: Literal["layers", "plain", "hypernetwork"] = "plain"
    constraint: Literal["projection", "penalty"] = "projection"
    penalty: float = 6.0
    loss: Literal["cross_entropy", "kl"] = "kl"
    lr: float | None = None
    temperature: float = 0.4
    estimator: Estimator = "reinmax"
    lifts: bool = False
    fixed_ratio: bool = False
    start_rows: int = 32
    further_budgets: Sequence[Budget] = ()

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "joint",
            steps=("at least 1", self.steps >= 1),
            penalty=("above 0 and finite", 0 < self.penalty < math.inf),
            lr=("above 0 and finite", self.lr is None or 0 < self.lr < math.inf),
            temperature=("above 0 and finite", 0 < self.temperature < math.inf),
            start_rows=("at least 1", self.start_rows >= 1),
        )
        if self.further_budgets and self.gates != "hypernetwork":
            raise UserError(
                f"joint.further_budgets names {len(self.further_budgets)}, and {self.gates} gates are not told the "
                f"budget. Use gates: hypernetwork, or a run for each budget."
            )

    @property
    def learning_rate(self) -> float:
        return self.lr or (0.001 if self.gates == "hypernetwork" else 0.02)
