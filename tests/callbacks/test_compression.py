"""What callbacks that compress share: their order, their rehearsal, and that they act once."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from support.families import tiny_model
from support.fits import PRUNING, AtStart, finetuner, fit, trainer
from support.ranks import on_two_ranks, together

from qpruner.adapters.lora import LoRAConfig
from qpruner.anatomy import architecture_of
from qpruner.callbacks import KeepModel, LoRAGuidedPruning, MixedPrecisionQuantization, StructuredPruning
from qpruner.callbacks.compression import CompressionInSetup, CompressionJob, Rehearsal, check_dense, check_order, told
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.model_folder import build_skeleton
from qpruner.plan import CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.pruning.selection import SelectionConfig
from qpruner.records.folder import RunFolder

INT8 = Precision("int8", 8)
PRUNES, QUANTIZES, GUIDED = StructuredPruning(**PRUNING), MixedPrecisionQuantization(4), LoRAGuidedPruning(0.1)


class Noting(CompressionInSetup):
    """Leaves a state, and does nothing for it but tell."""

    def __init__(self, leaves: State = State.PRUNED) -> None:
        self.leaves = leaves  # type: ignore[misc]
        self.jobs: list[CompressionJob] = []

    @property
    def options(self) -> dict[str, Any]:
        return {"leaves": self.leaves.value}

    def check(self, rehearsal: Rehearsal) -> None:
        raise NotImplementedError

    def compress(self, job: CompressionJob) -> None:
        self.jobs.append(job)
        job.model.base_state = self.leaves


# Order.


@pytest.mark.parametrize(
    "callbacks",
    [[], [KeepModel("a", "b")], [PRUNES], [QUANTIZES, GUIDED], [PRUNES, KeepModel("a", "b"), QUANTIZES, GUIDED]],
)
def test_a_fit_prunes_then_quantizes_then_prunes_in_training(callbacks: list[Any]) -> None:
    check_order(callbacks)


@pytest.mark.parametrize(
    ("callbacks", "stages"),
    [
        ([QUANTIZES, PRUNES], "quantized, then pruned"),
        ([PRUNES, PRUNES], "pruned, then pruned"),
        ([QUANTIZES, QUANTIZES], "quantized, then quantized"),
        ([GUIDED, QUANTIZES], "pruned in training, then quantized"),
        ([PRUNES, GUIDED, GUIDED], "pruned, then pruned in training, then pruned in training"),
    ],
)
def test_another_order_is_refused_with_what_it_would_leave(callbacks: list[Any], stages: str) -> None:
    with pytest.raises(UserError, match=f"^The callbacks leave the base {stages}; a fit prunes at most once"):
        check_order(callbacks)


# The rehearsal.


def rehearsal(**changes: Any) -> Rehearsal:
    return Rehearsal(build_skeleton(tiny_model("llama").config), LoRAConfig(**changes))


@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_a_rehearsal_has_the_widths_of_the_fit(ratio: float) -> None:
    tried = rehearsal()
    assert {parameter.device.type for parameter in tried.model.parameters()} == {"meta"}
    before = num_parameters(tried.model)
    tried.prune(ratio, SelectionConfig(scope="local"))
    assert tried.exact and num_parameters(tried.model) / before == pytest.approx(1 - ratio, abs=0.02)
    widths = architecture_of(tried.model.config)
    assert tried.plan.widths == widths != tried.plan.architecture
    assert [len(layer.kv_groups) for layer in tried.plan.layers] == list(widths.kv_groups)
    tried.prune(0.05, SelectionConfig(scope="local"))  # of what is left
    assert num_parameters(tried.model) < before * (1 - ratio)


def test_widths_that_depend_on_scores_are_not_made_up() -> None:
    tried = rehearsal()
    before = architecture_of(tried.model.config)
    tried.prune(0.1, SelectionConfig(scope="global"))
    assert not tried.exact and architecture_of(tried.model.config) == before


def test_what_cannot_be_had_is_found_without_weights() -> None:
    with pytest.raises(UserError, match="0.99"):
        rehearsal().prune(0.99, SelectionConfig())
    with pytest.raises(UserError, match="nothing_here"):
        rehearsal(target_modules=["nothing_here"])


# The job.


@pytest.fixture
def pruned(tiny_llama: Path) -> CompressedModel:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    plan = model.known_plan()
    assert isinstance(plan, CompressionPlan)
    model.prune([([0], list(range(8))) for _ in plan.layers])
    return model


def test_a_base_that_was_changed_is_kept_by_the_first_and_known_to_all(
    tiny_llama: Path, tmp_path: Path, pruned: CompressedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: list[int] = []
    keep = CompressedModel.keep

    def noted(model: CompressedModel, *arguments: Any, **options: Any) -> None:
        writers.append(models.index(model))
        keep(model, *arguments, **options)

    other = CompressedModel.load(str(tiny_llama), dtype="float32")
    other.prune([([0], list(range(8))) for _ in other.known_plan().layers])
    models = [pruned, other]
    monkeypatch.setattr(CompressedModel, "keep", noted)

    def work(processes: Processes) -> Any:
        job = CompressionJob(models[processes.rank], None, processes, LoRAConfig(), 0, keep_in=tmp_path / "model")
        job.keep()
        job.keep()  # it is
        return job.model.identity

    first, second = together(work, work)
    assert first == second == CompressedModel.open(tmp_path / "model").identity is not None
    assert writers == [0]


def test_nobody_waits_for_a_base_that_the_first_could_not_keep(
    tmp_path: Path, pruned: CompressedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def work(processes: Processes) -> None:
        CompressionJob(pruned, None, processes, LoRAConfig(), 0, keep_in=tmp_path / "model").keep()

    monkeypatch.setattr("qpruner.model_folder.write_base", no_room)
    for answer in together(work, work):
        assert isinstance(answer, UserError)
        assert str(answer).startswith(f"Cannot write '{tmp_path / 'model'}': No space left on device")


def test_without_a_folder_nothing_is_kept(pruned: CompressedModel) -> None:
    CompressionJob(pruned, None, Processes.alone(), LoRAConfig(), 0).keep()
    assert pruned.identity is None


# In setup.


def test_it_acts_once_in_a_fit_and_writes_the_recipe(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    noting, folder = Noting(), tmp_path / "model"
    first = finetuner(tiny_llama)
    running = trainer(noting)
    running.validate(first, datamodule=stories, verbose=False)
    assert noting.jobs == []
    running.fit(finetuner(tiny_llama), datamodule=stories)
    (job,) = noting.jobs
    assert job.data is stories and (job.seed, job.lora) == (first.seed, first.lora)
    assert (job.folder, job.keep_in) == (None, None)
    assert job.model.recipe == ({"name": "Noting", "options": {"leaves": "pruned"}},)
    # What comes compressed from its folder is left alone.
    again = finetuner(tiny_llama)
    again.kept_in = folder
    fit(again, stories, Noting())
    resumed, noted = finetuner(tiny_llama), Noting()
    resumed.kept_in = folder
    fit(resumed, stories, noted)
    assert noted.jobs == [] and resumed.compressed.recipe == job.model.recipe


def written_pages(file: str) -> list[int]:
    """Kilobytes that this process has written to, in memory of its own, of each mapping of a file."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [place for place, line in enumerate(lines) if line.endswith(file)]
    dirty = [next(line for line in lines[start:] if line.startswith("Private_Dirty")) for start in starts]
    return [int(line.split()[1]) for line in dirty]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what a process has written to on Linux")
def test_the_first_of_two_ranks_quantizes_and_both_share_what_it_keeps(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    def start(name: str, **ranks: Any) -> dict[str, Any]:
        """Tensors as training begins, of a fit in a run's folder."""
        callback = MixedPrecisionQuantization([8, 4])
        callback.folder = RunFolder(tmp_path / name)
        module = finetuner(tiny_llama)
        module.kept_in = callback.folder.model
        begun = AtStart(lambda module: (copy.deepcopy(module.model.state_dict()), written_pages("model.safetensors")))
        callbacks = [callback, KeepModel(module.kept_in, module.kept_in), begun]
        Trainer(
            accelerator="cpu", max_steps=1, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            callbacks=callbacks, **ranks,
        ).fit(module, datamodule=stories.for_another_trainer())  # fmt: skip
        state, written = begun.seen
        return {"state": dict(state), "written": written}

    def work(rank: int) -> dict[str, Any]:
        if rank == 1:
            CompressedModel.quantize = None  # type: ignore[method-assign,assignment]
        return start("two", devices=2, strategy="ddp")

    stories.prepare_data()
    one, *ranks = [start("one"), *on_two_ranks(work, tmp_path)]
    for rank in ranks:
        assert rank["written"] and not any(rank["written"])  # nor by DDP as it wraps the module
        assert rank["state"].keys() == one["state"].keys()
        different = [name for name, tensor in one["state"].items() if not torch.equal(rank["state"][name], tensor)]
        assert not different
    assert any(bool(tensor.any()) for name, tensor in one["state"].items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("state", "leaves", "done"),
    [
        (State.DENSE, State.PRUNED, False),
        (State.MERGED, State.PRUNED, False),
        (State.MERGED, State.QUANTIZED, False),
        (State.PRUNED, State.PRUNED, True),
        (State.PRUNED, State.QUANTIZED, False),
        (State.QUANTIZED, State.PRUNED, True),
        (State.QUANTIZED, State.QUANTIZED, True),
    ],
)
def test_it_is_done_where_the_base_is_as_far_or_further(
    pruned: CompressedModel, state: State, leaves: State, done: bool
) -> None:
    pruned.base_state = state
    assert Noting(leaves).is_done(pruned) is done


def test_what_has_adapters_or_is_packed_is_refused(tiny_llama: Path, pruned: CompressedModel) -> None:
    noting = Noting()
    noting.check_unadapted(pruned)
    check_dense(pruned)
    adapted = finetuner(tiny_llama)
    adapted.configure_model()
    with pytest.raises(UserError, match="^Noting compresses a base before it gets adapters, and this module has them"):
        noting.check_unadapted(adapted.compressed)
    plan = pruned.known_plan()
    packed = plan.with_precision([dict.fromkeys(layer.precision, INT8) for layer in plan.layers])
    pruned.quantize(packed, None, device=torch.device("cpu"))
    with pytest.raises(UserError, match="is quantized already; packed weights can be neither scored nor quantized"):
        check_dense(pruned)


def test_a_callback_is_told_with_what_it_was_asked_for() -> None:
    assert told("X", {"a": 1, "b": "c"}) == "X(a=1, b='c')" and told("X", {}) == "X()"
    assert str(Noting()) == "Noting(leaves='pruned')"
    assert Noting().step == {"name": "Noting", "options": {"leaves": "pruned"}}
