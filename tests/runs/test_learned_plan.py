"""When gates are compared and the plan is written, also across a kill; and what is said about it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.joint import BATCH, between, learner_of
from torch.utils.data import DataLoader

from qpruner.anatomy import unit_weights
from qpruner.callbacks import RunCheckpoint
from qpruner.joint.learner import Best, PlanLearner
from qpruner.joint.price import smooth_bytes
from qpruner.joint.projection import hard
from qpruner.joint.space import unit_bytes
from qpruner.records.folder import RunFolder
from qpruner.runs.learned_plan import LearnedPlan, notes_of, seen

STEPS = 4


def learn(folder: RunFolder, *callbacks: Callback, ckpt_path: Path | None = None, every: int = 2) -> PlanLearner:
    """Learns gates of a tiny model, from a checkpoint if there is one, and writes their plan."""
    learner = learner_of(steps=STEPS, lr=0.5)
    trainer = Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder.path),
        callbacks=[LearnedPlan(folder), *callbacks, RunCheckpoint(folder.checkpoint, every)],
    )  # fmt: skip
    trainer.fit(learner, DataLoader([BATCH] * STEPS, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return learner


class FailAt(Callback):
    """Ends the process, as it were, before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def fail(*_: object) -> None:
    raise RuntimeError("killed")


def test_a_killed_learning_goes_on_with_the_comparisons_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Gates are compared after every step here, so that a comparison is due at the step of the checkpoint, too."""
    step = 2
    whole = learn(RunFolder(tmp_path / "whole"))
    folder = RunFolder(tmp_path / "pieces")
    with pytest.raises(RuntimeError, match="killed"):
        learn(folder, FailAt(step))
    assert torch.load(folder.checkpoint, weights_only=True)["compared_at"] == step
    pieces = learn(folder, ckpt_path=folder.checkpoint)
    assert whole.best is not None and pieces.best is not None
    assert (pieces.best.step, pieces.best.loss) == (whole.best.step, whole.best.loss)
    assert folder.learned_plan.read_text() == RunFolder(tmp_path / "whole").learned_plan.read_text()


def test_killed_when_all_is_learned_and_repeated_writes_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint is there, so that no step is left to do."""
    learn(RunFolder(tmp_path / "whole"))
    folder = RunFolder(tmp_path / "pieces")
    with monkeypatch.context() as patch:
        patch.setattr("qpruner.runs.learned_plan.learning_figure", fail)
        with pytest.raises(RuntimeError, match="killed"):
            learn(folder)
    assert not folder.learned_plan.exists()
    learn(folder, ckpt_path=folder.checkpoint)
    assert folder.learned_plan.read_text() == RunFolder(tmp_path / "whole").learned_plan.read_text()
    assert folder.learning_picture.stat().st_size > 10_000


def with_the_gates_at(shift: float, learner: PlanLearner) -> PlanLearner:
    """The learner with all of its logits moved, as its best."""
    with torch.no_grad():
        for parameter in learner.gates.parameters():
            parameter.fill_(shift)
    learner.best = Best(20, 1.0, {name: values.clone() for name, values in learner.gates.state_dict().items()})
    return learner


def test_a_penalty_that_has_not_met_the_budget_is_said_and_seen_and_the_plan_is_within_it() -> None:
    learner = with_the_gates_at(9.0, learner_of(constraint="penalty"))
    (limit,) = learner.limits
    (plan,) = learner.plans()
    above = learner.above_threshold(limit)
    gates = hard(above, dict.fromkeys(above, 0.0))
    stored = float(smooth_bytes(learner.space, gates))
    assert stored == pytest.approx(learner.space.dearest, rel=0.02) and stored > limit >= unit_bytes(plan, 4)
    assert seen(learner, gates)["bytes"] == [stored]
    said, last = notes_of(learner, limit, plan)
    assert f"The penalty has left the gates at {stored:,.0f} bytes, above the budget of {limit:,}:" in said
    assert "Raise joint.penalty, which is 6," in said
    assert last == f"Learned a plan of {unit_bytes(plan, 4):,} bytes for the decoder's units, within {limit:,}."


@pytest.mark.parametrize("options", [{"constraint": "penalty"}, {"constraint": "projection"}])
def test_nothing_else_is_said_of_gates_within_the_budget(options: Mapping[str, Any]) -> None:
    learner = with_the_gates_at(0.0, learner_of(**options))
    (limit,) = learner.limits
    (plan,) = learner.plans()
    assert len([*notes_of(learner, limit, plan)]) == 1


def test_a_fixed_ratio_that_the_budget_has_no_room_for_is_said() -> None:
    learner = with_the_gates_at(0.0, learner_of({"pins_weights": True, "most_weights": 10**9}, fixed_ratio=True))
    (limit,) = learner.limits
    (plan,) = learner.plans()
    kept = unit_weights(plan.widths)
    ground = learner.ground
    for asked, notes in ((round(kept * 1.01), 1), (round(kept * 1.05), 2)):
        space = replace(ground.gated.space, most_weights=asked)
        ground.gated.space = space
        told = [*notes_of(learner, limit, plan)]
        assert len(told) == notes
    assert f"keeps {kept:,} weights of the decoder's units, fewer than the {asked:,}" in told[0]
    assert between(space) == limit
