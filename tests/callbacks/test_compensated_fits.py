"""Fits whose base makes up for what pruning took: when, on what text, and that it is done once."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.compensated import COMPENSATION, TEXT, compensated, differing, sliced
from support.fits import PRUNING, adapters, finetuner, fit, trainer
from support.guided_fits import guided

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy import architecture_of, decoder_layers
from qpruner.calibration.text import CalibrationConfig
from qpruner.callbacks import KeepModel, MixedPrecisionQuantization, PlannedPruning, StructuredPruning, pruning
from qpruner.callbacks.compensation import Compensating
from qpruner.callbacks.compression import Rehearsal
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.folder_manifest import read_manifest
from qpruner.model_folder import build_skeleton, read_base_config
from qpruner.plan import CompressionPlan, Precision
from qpruner.pruning.compensation import How
from qpruner.pruning.scores import LayerScores, score_units
from qpruner.quantization.formats import dequantize, quantize
from qpruner.training.module import LoRAFinetuner

COMPENSATED = PRUNING | {"ratio": 0.08} | COMPENSATION
WRITES = {f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}


def base_of(module: LoRAFinetuner) -> Any:
    """The base of a module, without adapters."""
    return copy.deepcopy(module.model).unload()


def plan_of(module: LoRAFinetuner) -> CompressionPlan:
    assert module.plan is not None
    return module.plan


# What a fit does.


@pytest.mark.parametrize("how", ["sequential", "local"])
def test_the_base_that_is_kept_is_the_compensated_one_and_is_not_made_again(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: How
) -> None:
    def session() -> LoRAFinetuner:
        module = finetuner(tiny_llama)
        module.kept_in = tmp_path / "model"
        return fit(module, stories, StructuredPruning(**COMPENSATED | {"compensation": how}))

    first = session()
    kept = CompressedModel.open(tmp_path / "model")
    assert kept.state is State.PRUNED and kept.plan == first.plan
    assert not differing(kept.network, compensated(tiny_llama, [plan_of(first)], stories, how))
    changed = differing(kept.network, sliced(tiny_llama, plan_of(first)))
    assert changed and changed <= WRITES
    (step,) = read_manifest(tmp_path / "model")["recipe"]
    assert step["options"]["compensation"] == how
    assert step["options"]["compensation_text"] == {"num_sequences": 16, "length": 12, "batch_size": 4096}
    # The second session has neither the dense base nor the text.
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    monkeypatch.setattr("qpruner.compressed.compensate_", None)
    monkeypatch.setattr(StoriesDataModule, "calibration", None)
    second = session()
    assert not differing(base_of(second), kept.network)
    assert all(torch.equal(adapters(second)[name], tensor) for name, tensor in adapters(first).items())


def test_a_plan_is_carried_out_to_the_weights_of_the_fit_that_made_it(
    tiny_llama: Path, stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = StructuredPruning(**COMPENSATED)
    first = fit(finetuner(tiny_llama), stories, configured)
    monkeypatch.setattr(pruning, "score_units", None)
    planned = PlannedPruning.of_plan(plan_of(first), configured.compensating)
    assert planned.compensating == configured.compensating
    second = fit(finetuner(tiny_llama), stories, planned)
    assert second.plan == first.plan and not differing(base_of(second), base_of(first))
    assert differing(base_of(second), sliced(tiny_llama, plan_of(first)))


def test_a_plan_that_prunes_nothing_needs_no_text(tiny_llama: Path, stories: StoriesDataModule) -> None:
    dense = CompressionPlan.dense(architecture_of(read_base_config(str(tiny_llama))), None)
    planned = PlannedPruning.of_plan(dense, None)
    assert planned.compensating == StructuredPruning(0.1).compensating
    planned.check_text(stories)
    module = fit(finetuner(tiny_llama), stories, planned)
    assert not differing(base_of(module), sliced(tiny_llama, dense))


def test_each_round_scores_and_makes_up_for_what_the_one_before_left(
    tiny_llama: Path, stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored, plans = [], []

    def score(network: Any, *given: Any, **options: Any) -> list[LayerScores]:
        scored.append(copy.deepcopy(network))
        return score_units(network, *given, **options)

    def compensate(self: CompressedModel, *given: Any) -> Any:
        plans.append(self.known_plan())
        return done(self, *given)

    done = CompressedModel.compensate
    monkeypatch.setattr(pruning, "score_units", score)
    monkeypatch.setattr(CompressedModel, "compensate", compensate)
    module = fit(finetuner(tiny_llama), stories, StructuredPruning(**COMPENSATED, rounds=2))
    assert len(scored) == len(plans) == 2 and plans[0].widths != plans[1].widths == plan_of(module).widths
    assert not differing(scored[1], compensated(tiny_llama, plans[:1], stories))
    assert differing(scored[1], sliced(tiny_llama, plans[0]))
    assert not differing(base_of(module), compensated(tiny_llama, plans, stories))


def test_what_is_quantized_is_the_compensated_base(tiny_llama: Path, stories: StoriesDataModule) -> None:
    quantization = MixedPrecisionQuantization(8, loftq_iterations=0)
    module = fit(finetuner(tiny_llama), stories, StructuredPruning(**COMPENSATED), quantization)
    expected = compensated(tiny_llama, [plan_of(module)], stories)
    layers = decoder_layers(module.model.get_base_model()), decoder_layers(expected)
    for layer, other in zip(*layers, strict=True):
        for name, linear in layer.linears.items():
            packed = quantize(other.linears[name], Precision("int8", 8))
            assert torch.equal(dequantize(linear.base_layer), dequantize(packed))  # type: ignore[arg-type]


def test_two_gloo_ranks_compensate_as_one(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    """Each rank has eight of the sixteen sequences."""
    stories.prepare_data()
    for devices in (1, 2):
        module = finetuner(tiny_llama)
        module.kept_in = tmp_path / str(devices)
        Trainer(
            accelerator="cpu", devices=devices, strategy="ddp_fork" if devices > 1 else "auto", max_steps=1,
            limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
            callbacks=[
                StructuredPruning(**COMPENSATED | {"criterion": "fisher"}), KeepModel(module.kept_in, module.kept_in)
            ],
        ).fit(module, datamodule=stories.for_another_trainer())  # fmt: skip
    one, two = (CompressedModel.open(tmp_path / str(devices)) for devices in (1, 2))
    assert one.plan == two.plan
    assert differing(one.network, sliced(tiny_llama, one.known_plan()))
    for name, tensor in one.network.state_dict().items():
        torch.testing.assert_close(two.network.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


# Bad input.


@pytest.fixture(params=["StructuredPruning", "PlannedPruning", "LoRAGuidedPruning"])
def prunes(request: Any, tiny_llama: Path) -> Callable[..., Any]:
    """Makes a callback that prunes, whose scores need no text, with a compensation of some text."""
    dense = CompressionPlan.dense(architecture_of(read_base_config(str(tiny_llama))), None)
    make: Callable[..., Any] = {
        "StructuredPruning": partial(StructuredPruning, 0.05, "magnitude_l1"),
        "PlannedPruning": partial(PlannedPruning, dense.keeping([([0, 1], range(40))] * 2)),
        "LoRAGuidedPruning": partial(guided, compensation="sequential"),
    }[request.param]
    return lambda *text: make(compensation_text=CalibrationConfig(*text))


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "score_units", None)
    monkeypatch.setattr(CompressedModel, "prune", None)
    monkeypatch.setattr(CompressedModel, "attach", None)


@pytest.mark.usefixtures("_no_work")
def test_a_fit_without_a_data_module_is_refused_before_any_work(
    tiny_llama: Path, stories: StoriesDataModule, prunes: Callable[..., Callback]
) -> None:
    with pytest.raises(UserError, match="^Compensation 'sequential' needs calibration text; give fit a data module"):
        trainer(prunes(16, 12)).fit(finetuner(tiny_llama), train_dataloaders=stories.train_dataloader())


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            (4, 12),
            r"of which 36 tokens decide, .*; the widest linear has 48 inputs .* Give at least 5 sequences, or use",
        ),
        ((3, 24), r"compensation_text has 3 sequences of 24 tokens, .* Give at least 4 sequences"),
    ],
    ids=["fewer tokens than channels", "no sequence to hold out"],
)
def test_too_little_text_for_the_channels_is_refused_before_any_work(
    tiny_llama: Path, stories: StoriesDataModule, prunes: Callable[..., Any], text: tuple[int, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):  # as a run finds it, without weights
        prunes(*text).check(Rehearsal(build_skeleton(read_base_config(str(tiny_llama))), LoRAConfig(r=2)))
    with pytest.raises(UserError, match=said):
        fit(finetuner(tiny_llama), stories, prunes(*text))
    prunes(5, 12).check(Rehearsal(build_skeleton(read_base_config(str(tiny_llama))), LoRAConfig(r=2)))


@pytest.mark.usefixtures("_no_work")
def test_more_text_than_there_is_is_refused_before_any_work(
    tiny_llama: Path, stories: StoriesDataModule, prunes: Callable[..., Any]
) -> None:
    said = "asks for 45 sequences of 12 tokens; .* have 528 tokens, enough for 44"
    with pytest.raises(UserError, match=said):
        prunes(45, 12).check_text(stories)
    with pytest.raises(UserError, match=said):
        fit(finetuner(tiny_llama), stories, prunes(45, 12))
    prunes(44, 12).check_text(stories)


def test_packed_weights_are_refused_before_any_work(tiny_llama: Path, stories: StoriesDataModule) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    precision = Precision("int8", 8)
    units = [dict.fromkeys(layer.precision, precision) for layer in model.known_plan().layers]
    model.quantize(model.known_plan().with_precision(units), None, device=torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"cannot be compensated: .*Prune the dense base and quantize it afterwards, or"
    ):
        Compensating("sequential", TEXT).begin(model, stories)
    none = Compensating("none", TEXT)
    none.begin(model, None)
    assert none.remember(model) is None
