"""How a fit that prunes ends, what may follow it, and that it goes on after a cut."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from support.compensated import COMPENSATION, TEXT, differing
from support.fits import Losses, adapters, finetuner, logits
from support.guided_fits import EVENTS, LAST, STEPS, At, fit, guided, kept_of, masked_logits, scores_of, size_of_base

from qpruner.adapter_files import has_trained_adapters
from qpruner.calibration.text import Calibration
from qpruner.callbacks import KeepModel, LoRAGuidedPruning, MixedPrecisionQuantization, RunCheckpoint
from qpruner.compressed import CompressedModel
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.folder_manifest import read_manifest
from qpruner.model_folder import load_compressed
from qpruner.processes import Processes
from qpruner.training.module import LoRAFinetuner


@pytest.mark.parametrize("last", [1, 5, 9])
def test_a_fit_that_ends_early_is_pruned_to_the_ratio(tiny_llama: Path, stories: StoriesDataModule, last: int) -> None:
    """Before the first event, between two, and in the cool-down, when nothing is left to do."""

    def stop(trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= last

    at_end = At("on_train_end", masked_logits)
    callbacks = guided(), At("on_train_batch_end", stop), at_end
    if last < 8:
        with pytest.warns(UserWarning, match=rf"ended after {last} of 10 optimizer steps, .* is pruned now"):
            module = fit(finetuner(tiny_llama), stories, *callbacks)
    else:
        module = fit(finetuner(tiny_llama), stories, *callbacks)
    assert module.trainer.global_step == last
    assert [(len(groups), len(channels)) for groups, channels in kept_of(module)] == [(1, 30)] * 2
    torch.testing.assert_close(logits(module.model), at_end.seen[0], rtol=1e-5, atol=1e-6)


def test_a_fit_that_an_error_ended_leaves_nothing_that_looks_on(tiny_llama: Path, stories: StoriesDataModule) -> None:
    """As in a notebook, where the same module is fitted again: each step would count twice."""

    def fail(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise MemoryError

    module, callback = finetuner(tiny_llama), guided(criterion="gradient")
    with pytest.raises(MemoryError):
        fit(module, stories, callback, At("on_train_batch_end", fail))
    assert module.after_clipping == []
    linears = [one for one in module.modules() if isinstance(one, torch.nn.Linear)]
    assert not any(one._forward_hooks or one._backward_hooks for one in linears)


def test_a_second_fit_trains_on_what_is_left(tiny_llama: Path, stories: StoriesDataModule) -> None:
    module, losses = fit(finetuner(tiny_llama), stories, guided()), Losses()
    plan, before, size = module.plan, adapters(module), size_of_base(module)
    fit(module, stories, losses, steps=3)
    assert len(losses.values) == 3 and all(math.isfinite(loss) for loss in losses.values)
    assert module.plan == plan and size_of_base(module) == size and module.after_clipping == []
    after = adapters(module)
    assert after.keys() == before.keys() and all(not torch.equal(after[name], t) for name, t in before.items())
    with pytest.raises(UserError, match=r"module has them already. Make a new LoRAFinetuner"):
        fit(module, stories, guided())


def test_what_is_left_is_kept_in_the_folder_of_the_run(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    module = fit(finetuner(tiny_llama), stories, guided())
    kept = fit(finetuner(tiny_llama), stories, guided(), KeepModel(tmp_path / "base", tmp_path / "model"))
    assert kept.plan == module.plan and kept.compressed.identity == module.compressed.identity
    assert kept.compressed.kept is not None and kept.compressed.kept.path == tmp_path / "model"
    assert not (tmp_path / "base").exists()  # nothing was done to the base before training
    assert has_trained_adapters(tmp_path / "model")
    assert [step["name"] for step in read_manifest(tmp_path / "model")["recipe"]] == ["LoRAGuidedPruning"]
    assert torch.equal(logits(load_compressed(tmp_path / "model")), logits(kept.model))
    assert torch.equal(logits(kept.model), logits(module.model))


def test_what_is_left_makes_up_for_what_went_and_the_adapters_stay(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    whole: dict[str, torch.Tensor] = {}

    class BeforeItNarrows(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert isinstance(pl_module, LoRAFinetuner)
            whole.update(
                {name: p.detach().clone() for name, p in pl_module.model.named_parameters() if "lora_" in name}
            )

    plain = fit(finetuner(tiny_llama), stories, BeforeItNarrows(), guided())
    kept = fit(finetuner(tiny_llama), stories, guided(**COMPENSATION), KeepModel(tmp_path / "base", tmp_path / "model"))
    assert kept.plan == plain.plan and plain.plan is not None
    factors = adapters(plain)
    assert all(torch.equal(tensor, factors[name]) for name, tensor in adapters(kept).items())
    changed = differing(kept.model, plain.model)
    assert changed and all(
        name.endswith(("o_proj.base_layer.weight", "down_proj.base_layer.weight")) for name in changed
    )
    opened = CompressedModel.open(tmp_path / "model", trained_adapters=True)
    (step,) = opened.recipe
    assert step["options"]["compensation"] == "sequential" and opened.plan == kept.plan
    opened.attach(kept.lora, seed=kept.seed)
    assert not differing(opened.network, kept.model)
    # By hand, against the dense model with all that its adapters have learnt.
    dense = CompressedModel.load(str(tiny_llama), dtype="float32")
    dense.attach(plain.lora, seed=plain.seed)
    dense.network.load_state_dict(whole, strict=False)
    text = Calibration.share(stories.calibration(TEXT.num_sequences, TEXT.length), Processes.alone(), TEXT.batch_size)
    plain.compressed.compensate(dense.network, dense.known_plan(), text, "sequential")
    assert not differing(kept.model, plain.model)


def test_a_checkpoint_of_a_second_fit_gives_back_the_packed_base_as_it_was_narrowed(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    """Quantized and then narrowed, which is another base than narrowed and then quantized."""
    module = fit(finetuner(tiny_llama), stories, MixedPrecisionQuantization(4), guided())
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    fit(module, stories, checkpoint, steps=2)
    loaded = LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)
    assert loaded.plan == module.plan and loaded.compressed.identity == module.compressed.identity
    assert torch.equal(logits(loaded.model), logits(module.model))


# Cut and resumed.


@pytest.mark.parametrize(
    ("every", "bits", "changes"),
    [
        pytest.param(1, 16, {}, marks=pytest.mark.slow),
        (2, 16, {}),
        (3, 16, COMPENSATION),
        (5, 4, {}),
        pytest.param(9, 16, {}, marks=pytest.mark.slow),
        pytest.param(10, 16, {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "compensated" if value == COMPENSATION else str(value),
)
@pytest.mark.filterwarnings("error:The fit ended")
def test_resumed_from_a_checkpoint_equals_uninterrupted(
    tiny_llama: Path,
    stories: StoriesDataModule,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    every: int,
    bits: int,
    changes: dict[str, Any],
) -> None:
    """From before the first event, at one, between two, in the cool-down and at the end."""

    def power_cut(trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == every + 1:
            raise InterruptedError

    def session(*more: Callback, path: Path | None = None) -> tuple[LoRAFinetuner, LoRAGuidedPruning, list[str]]:
        caplog.clear()
        quantization, pruning = [MixedPrecisionQuantization(bits)] * (bits < 16), guided(**changes)
        module = fit(finetuner(tiny_llama), stories, *quantization, pruning, *more, path=path)
        return module, pruning, [line for line in caplog.messages if " are masked" in line]

    with caplog.at_level(logging.INFO):
        whole, expected, lines = session()
        checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=every)
        if every < STEPS:
            with pytest.raises(InterruptedError):
                session(At("on_train_batch_end", power_cut), checkpoint)
        else:
            session(checkpoint)
        resumed, found, later = session(path=checkpoint.path)
    assert len(lines) == 4 and later == lines[sum(event <= every for event in EVENTS) :]
    assert resumed.plan == whole.plan
    assert all(torch.equal(a, b) for a, b in zip(scores_of(found), scores_of(expected), strict=True))
    assert (found._average.steps, found._average.skipped) == (LAST, 0)
    ours, theirs = adapters(resumed), adapters(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert torch.equal(logits(resumed.model), logits(whole.model))
