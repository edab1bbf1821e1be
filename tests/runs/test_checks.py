"""Options of a run that do not go together."""

from typing import Any

import pytest

from qpruner.callbacks import LoRAGuidedPruning, StructuredPruning
from qpruner.errors import UserError
from qpruner.runs.checks import check_fit, check_search
from qpruner.runs.phases import PhaseConfig

LATER = PhaseConfig(max_epochs=1)


def test_a_fit_carries_out_a_plan_or_has_phases() -> None:
    check_fit([], "plan.json", None)
    check_fit([LATER], None, None)
    with pytest.raises(UserError, match="carries out a plan in one fit, and the run has phases"):
        check_fit([LATER], "plan.json", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (([], [], "plan.json", None), "A search makes plans"),
        (([StructuredPruning(0.1), LoRAGuidedPruning(0.1)], [], None, None), "a search prunes before its trials"),
        (([], [LATER], None, None), "A search has no phases"),
    ],
)
def test_a_search_makes_plans_out_of_one_pruned_model(options: Any, said: str) -> None:
    check_search([StructuredPruning(0.1)], [], None, None)
    with pytest.raises(UserError, match=said):
        check_search(*options)
