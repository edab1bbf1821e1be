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

    What may be decided follows from the callbacks of the run: ``StructuredPruning`` says that units may go, which
    layers are left alone, how much of the others always stays (``selection.floor``) and what widths are multiples of;
    ``MixedPrecisionQuantization`` has the budget, the widths (``deciding.widths``) and their number formats. The
    learned plan takes their place: it is carried out, with the compensation and the calibrated rounding that they ask
    for, and recovered. So the variants of the paper are

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
    GRASPrune (arXiv:2604.19398). `qpruner.joint` says which idea comes from where.

    Args:
        steps: number of optimizer steps in which gates are learned, each on a batch of the training split; at least 1.
            Of the states at the start and after each tenth of the steps, the best on the ``start_rows`` is taken.
        gates: how gates are parametrized: ``plain``, a parameter for each gate; ``layers``, one for all KV groups and
            one for all FFN channels of a layer, which keep their initial order; ``hypernetwork``, a small recurrent
            network emits all of them.
        constraint: how gates are kept within the budget: ``projection``, every step opens as many gates as the budget
            allows; ``penalty``, gates are drawn to the budget by ``penalty * |log(bytes / budget)|`` in the loss, and
            projected at the end.
        penalty: weight of the penalty term in the loss, above 0.
        loss: loss that gates are learned with: ``kl``, the divergence of the compressed model's predictions from the
            dense model's; ``cross_entropy``, that of the text, which saves the forward pass of the dense model.
        lr: initial learning rate of AdamW, above 0, which falls linearly to 0; by default 0.02, and 0.001 for a
            hypernetwork.
        temperature: initial temperature of the noise with which gates are sampled in training, in units of a logit,
            above 0; it falls linearly to a tenth.
        estimator: gradient estimator of the gates: ``reinmax``, right for losses that are quadratic between open and
            closed; ``straight_through``, that of a Gumbel-sigmoid.
        lifts: whether input channels of a linear may be held in the widest precision while the others have that of
            their unit; channels are then reordered so that the lifted ones come first. All widths are then packed ones:
            16 bits are not among them.
        fixed_ratio: whether the share of pruned parameters is fixed to ``StructuredPruning.ratio``, and only where to
            prune is learned; ``budget.multiply_adds`` is then left out.
        start_rows: number of training rows whose Fisher information initialises the gates, and whose loss compares
            their states, at least 1. They are the rows that an epoch reads last, so that a fit shorter than an epoch
            does not learn from them. If the split has fewer rows, all are used.
        further_budgets: further budgets for which the same gates learn plans, in turns; only with a hypernetwork, which
            takes the budget as input. Multiply-adds are limited by the main budget alone, for all of them.

    Raises:
        UserError: a value out of its range, or further budgets without a hypernetwork.
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
