"""When pruning happens in a fit, on what text, and what is left for the fit after it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.fits import PRUNING, adapters, finetuner, fit, trainer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy import architecture_of, decoder_layers
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import PlannedPruning, RunCheckpoint, StructuredPruning
from qpruner.callbacks.compression import Rehearsal
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.model_folder import build_skeleton, load_compressed, read_base_config
from qpruner.plan import CompressionPlan
from qpruner.pretrained import EMBEDDED, load_model, load_tokenizer
from qpruner.pruning.selection import SelectionConfig
from qpruner.training.module import LoRAFinetuner


def test_the_fit_trains_adapters_of_the_narrow_shapes_on_slices_of_the_dense_weights(
    tiny_llama: Path, stories: StoriesDataModule
) -> None:
    module = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING))
    plan, dense = module.plan, load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    assert plan is not None and plan.base_sha256 == module.compressed.base_sha256
    assert plan.architecture == architecture_of(dense.config)
    base = module.model.get_base_model()
    for layer, (narrow, whole) in zip(
        plan.layers, zip(base.model.layers, dense.model.layers, strict=True), strict=True
    ):
        kept = list(layer.ffn_channels)
        assert len(kept) < 48
        assert torch.equal(narrow.mlp.up_proj.base_layer.weight, whole.mlp.up_proj.weight[kept])
        assert torch.equal(narrow.mlp.down_proj.base_layer.weight, whole.mlp.down_proj.weight[:, kept])
        assert narrow.mlp.up_proj.lora_B["default"].weight.shape == (len(kept), 2)
        assert narrow.mlp.down_proj.lora_A["default"].weight.shape == (2, len(kept))
        assert narrow.mlp.up_proj.lora_B["default"].weight.abs().sum() > 0
    assert not any(p.requires_grad for name, p in module.named_parameters() if "lora_" not in name)


def test_units_are_scored_on_the_calibration_text_of_the_data_module(
    tiny_llama: Path, stories: StoriesDataModule
) -> None:
    """The kept channels are the highest of a plain reference: |w g| summed over the three weights of a channel."""
    stories.prepare_data()
    tokens = stories.calibration(6, 8)
    model = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False).requires_grad_(True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    plan = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING)).plan
    assert plan is not None
    for layer, kept in zip(decoder_layers(model), plan.layers, strict=True):
        score = sum(
            (linear.weight * linear.weight.grad).abs().sum(axis)
            for linear, axis in ((layer.gate, 1), (layer.up, 1), (layer.down, 0))
        )
        expected = sorted(torch.as_tensor(score).topk(len(kept.ffn_channels)).indices.tolist())
        assert list(kept.ffn_channels) == expected


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_scores_follow_the_precision_of_the_trainer(
    tiny_llama: Path, stories: StoriesDataModule, precision: str
) -> None:
    exact = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING)).plan
    module = finetuner(tiny_llama, dtype="bfloat16" if precision == "bf16-true" else "float32")
    rounded = fit(module, stories, StructuredPruning(**PRUNING), precision=precision).plan
    assert exact is not None and rounded is not None
    assert rounded.widths == exact.widths
    for layer, expected in zip(rounded.layers, exact.layers, strict=True):
        assert len({*layer.ffn_channels} & {*expected.ffn_channels}) >= len(expected.ffn_channels) - 2


@pytest.mark.parametrize("again", [True, False], ids=["pruned again", "shapes from the checkpoint"])
def test_resumed_from_a_checkpoint_equals_uninterrupted(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, again: bool
) -> None:
    class PowerCut(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise InterruptedError

    whole = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), steps=4)
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    with pytest.raises(InterruptedError):
        fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), PowerCut(), checkpoint, steps=4)
    resumed = finetuner(tiny_llama)
    trainer(*[StructuredPruning(**PRUNING)] * again, steps=4).fit(
        resumed, datamodule=stories, ckpt_path=checkpoint.path, weights_only=True
    )
    assert resumed.plan == whole.plan
    assert all(torch.equal(adapters(resumed)[name], tensor) for name, tensor in adapters(whole).items())


def test_load_from_checkpoint_rebuilds_the_shapes(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    module = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), checkpoint)
    loaded = LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)
    assert loaded.plan == module.plan
    tokens = torch.randint(0, 2048, (2, 9))
    with torch.no_grad():
        expected, found = (m.model.eval()(input_ids=tokens).logits for m in (module, loaded))
    assert torch.equal(found, expected)


def test_a_checkpoint_of_another_plan_or_of_none_is_refused(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    for callbacks, said in (([], "not compressed"), ([StructuredPruning(**PRUNING | {"ratio": 0.08})], "another plan")):
        checkpoint = RunCheckpoint(tmp_path / said / "last.ckpt", every_n_steps=2)
        fit(finetuner(tiny_llama), stories, *callbacks, checkpoint)
        with pytest.raises(UserError, match=said):
            trainer(StructuredPruning(**PRUNING), steps=4).fit(
                finetuner(tiny_llama), datamodule=stories, ckpt_path=checkpoint.path, weights_only=True
            )


def test_the_base_is_kept_before_training_and_taken_from_there(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert (tmp_path / "model" / "model.safetensors").exists()
            assert CompressionPlan.read(tmp_path / "model" / "plan.json") == pl_module.plan

    first = finetuner(tiny_llama)
    first.kept_in = tmp_path / "model"
    fit(first, stories, StructuredPruning(**PRUNING), Look())
    # The second session needs neither scores nor the dense model.
    monkeypatch.setattr(StructuredPruning, "compress", None)
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    second = finetuner(tiny_llama)
    second.kept_in = tmp_path / "model"
    fit(second, stories, StructuredPruning(**PRUNING))
    assert second.plan == first.plan and second.compressed.base_sha256 == first.compressed.base_sha256
    assert all(torch.equal(adapters(second)[name], tensor) for name, tensor in adapters(first).items())
    tokens = torch.randint(0, 2048, (2, 9))
    with torch.no_grad():
        expected = first.model.eval()(input_ids=tokens).logits
        assert torch.equal(load_compressed(tmp_path / "model")(input_ids=tokens).logits, expected)


def test_a_plan_is_carried_out_without_scores(
    tiny_llama: Path, stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING)).plan
    assert plan is not None
    monkeypatch.setattr("qpruner.callbacks.pruning.score_units", None)
    followed = fit(finetuner(tiny_llama), stories, PlannedPruning(plan, compensation="none"))
    assert followed.plan == plan
    layers = followed.model.get_base_model().model.layers
    assert [layer.mlp.up_proj.out_features for layer in layers] == list(plan.widths.ffn_channels)


def test_rounds_and_scopes_meet_the_ratio(tiny_llama: Path, stories: StoriesDataModule) -> None:
    before = num_parameters(load_model(str(tiny_llama), dtype="float32", trust_remote_code=False))
    for changes in ({"rounds": 3}, {"selection": SelectionConfig(scope="global")}, {"criterion": "param_mix"}):
        module = finetuner(tiny_llama)
        running = trainer(StructuredPruning(**PRUNING | changes))
        running.fit(module, datamodule=stories)
        after = num_parameters(module.model.unload())
        assert 1 - after / before == pytest.approx(0.05, abs=96 * 2 / before)


def test_the_batch_size_of_calibration_is_no_part_of_the_result(tiny_llama: Path, stories: StoriesDataModule) -> None:
    plans = []
    for size in (4096, 16, 1):
        calibration = CalibrationConfig(num_sequences=6, length=8, batch_size=size)
        plans.append(
            fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING | {"calibration": calibration})).plan
        )
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StructuredPruning(0), "ratio 0"),
        (lambda: StructuredPruning(1.0), r"ratio 1.0; .* is in \(0, 1\)"),
        (lambda: StructuredPruning(-0.2), "ratio -0.2"),
        (lambda: StructuredPruning(0.2, rounds=0), "rounds 0; it takes at least 1"),
        (lambda: CalibrationConfig(num_sequences=0), "calibration.num_sequences is 0; it must be at least 1"),
        (lambda: CalibrationConfig(batch_size=0), "calibration.batch_size is 0; it must be at least 1"),
        (lambda: SelectionConfig(floor=0), r"floor is 0; .* \(0, 1\)"),
        (lambda: SelectionConfig(round_to=0), "round_to is 0"),
        (lambda: SelectionConfig(uniform=True, leave_alone=[0]), "Drop one of the two"),
    ],
)
def test_impossible_options_are_refused_when_they_are_made(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.9}, "at most 0.1"),
        ({"selection": SelectionConfig(leave_alone=[0, 1])}, "names every layer"),
        (
            {"calibration": CalibrationConfig(length=500)},
            r"the 22 training rows have 528 tokens, enough for 1\. Ask for fewer",
        ),
    ],
)
def test_what_cannot_be_had_of_this_model_is_refused(
    tiny_llama: Path, stories: StoriesDataModule, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING | changes))


def test_an_unsupported_family_is_named_with_those_that_are_supported(
    tmp_path: Path, stories: StoriesDataModule
) -> None:
    sizes = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    load_tokenizer(EMBEDDED).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'gpt_neox' cannot be pruned; llama, .*gpt2 can.*qpruner/anatomy/families.py"):
        fit(
            finetuner(tmp_path, lora=LoRAConfig(target_modules=["query_key_value"])),
            stories,
            StructuredPruning(**PRUNING),
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.0005}, "would remove nothing"),
        (
            {"criterion": "reconstruction", "calibration": CalibrationConfig(num_sequences=6, length=4)},
            "sequences have 4 tokens, of which the first 4 are left out",
        ),
    ],
)
def test_what_cannot_be_had_is_told_in_the_rehearsal(tiny_llama: Path, options: dict[str, Any], said: str) -> None:
    skeleton = build_skeleton(read_base_config(str(tiny_llama)))
    with pytest.raises(UserError, match=said):
        StructuredPruning(**PRUNING | options).check(Rehearsal(skeleton, LoRAConfig()))


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_search_of_widths_may_start_from_the_whole_model(tiny_llama: Path, scope: Any) -> None:
    skeleton = build_skeleton(read_base_config(str(tiny_llama)))
    pruning = StructuredPruning(**PRUNING | {"ratio": 0.0005, "selection": SelectionConfig(scope=scope)})
    rehearsal = Rehearsal(skeleton, LoRAConfig(), decides_on_widths=True)
    pruning.check(rehearsal)
    assert rehearsal.plan.widths == rehearsal.plan.architecture
