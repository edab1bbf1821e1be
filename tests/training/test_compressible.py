"""Which base a module loads, how often, and what ranks make of it together."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from support.fits import PRUNING, adapters, finetuner, fit, logits

from qpruner.callbacks import KeepModel, StructuredPruning
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.pretrained import load_model
from qpruner.training import compressible
from qpruner.training.module import LoRAFinetuner


@pytest.fixture
def pruned(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> tuple[Path, LoRAFinetuner]:
    """A fit that pruned, and the folder that it left."""
    folder = tmp_path / "first"
    return folder, fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), KeepModel(folder, folder))


def test_there_is_no_model_before_it_is_loaded(tiny_llama: Path) -> None:
    module = finetuner(tiny_llama)
    assert module.model is None and module.plan is None
    with pytest.raises(RuntimeError, match="No model is loaded"):
        _ = module.compressed


def test_the_dense_base_is_loaded_once_and_gets_its_adapters_once(tiny_llama: Path) -> None:
    module = finetuner(tiny_llama)
    module.load_base()
    held, dense = module.held, load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    assert module.compressed.state is State.DENSE and torch.equal(logits(module.model), logits(dense))
    module.configure_model()
    started = adapters(module)
    module.configure_model()
    assert module.held is held and len(started) == 2 * 2 * 7
    assert all(torch.equal(adapters(module)[name], tensor) for name, tensor in started.items())
    module.release()
    module.load_base()
    assert module.held is not held and module.compressed.state is State.DENSE


def test_half_precision_is_of_parameters_alone(tiny_llama: Path) -> None:
    """As ``--trainer.precision bf16-true`` casts a module: rotary frequencies stay as transformers has them."""
    module = finetuner(tiny_llama)
    module.configure_model()
    rotary = module.model.get_base_model().model.rotary_emb
    frequencies = rotary.inv_freq
    HalfPrecision("bf16-true").convert_module(module)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, frequencies)
    module.register_buffer("one", torch.ones(2))
    module.register_buffer("same", module.one)
    assert module.to("meta") and {buffer.device.type for buffer in module.buffers()} == {"meta"}


def test_what_is_kept_goes_before_what_an_earlier_fit_left_and_that_before_the_dense(
    tiny_llama: Path, pruned: tuple[Path, LoRAFinetuner], tmp_path: Path
) -> None:
    folder, first = pruned
    with_adapters = logits(first.model)
    with first.adapters_disabled():
        alone = logits(first.model)
    assert not torch.equal(with_adapters, alone)
    # Continued: with its adapters, as they were trained.
    later = finetuner(tiny_llama)
    later.kept_in, later.continues_from = tmp_path / "second", folder
    later.configure_model()
    assert later.plan == first.plan and torch.equal(logits(later.model), with_adapters)
    # Kept: with adapters that start anew.
    resumed = finetuner(tiny_llama)
    resumed.kept_in, resumed.continues_from = folder, tmp_path / "nothing"
    resumed.configure_model()
    assert resumed.plan == first.plan and torch.equal(logits(resumed.model), alone)


def test_what_an_earlier_fit_left_is_merged_to_be_compressed_further(
    tiny_llama: Path, pruned: tuple[Path, LoRAFinetuner]
) -> None:
    folder, first = pruned
    later = finetuner(tiny_llama)
    later.continues_from = folder
    later.load_base()
    later.merge_inherited()
    assert "lora" not in str(type(later.model)).lower() and later.plan == first.plan
    torch.testing.assert_close(logits(later.model), logits(first.model), rtol=1e-5, atol=1e-6)
    # A base that is this fit's own has nothing to merge.
    own = finetuner(tiny_llama)
    own.kept_in = folder
    own.load_base()
    held, before = own.compressed.state, logits(own.model)
    own.merge_inherited()
    assert own.compressed.state is held and torch.equal(logits(own.model), before)


def test_a_model_that_somebody_else_holds_is_not_kept(tiny_llama: Path, stories: StoriesDataModule) -> None:
    compressed = CompressedModel.load(str(tiny_llama), dtype="float32", trust_remote_code=False)
    module = finetuner(tiny_llama).hold(compressed)
    fit(module, stories, StructuredPruning(**PRUNING))
    assert module.compressed is compressed and compressed.state is State.ADAPTED
    assert compressed.plan is not None and compressed.plan.widths != compressed.plan.architecture
    assert not any(Path(compressible.BASES).iterdir())


def two_ranks(module: LoRAFinetuner, **strategy: Any) -> LoRAFinetuner:
    """The module on the second of two ranks."""
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=2, is_global_zero=False, datamodule=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), **strategy),
    )  # fmt: skip
    return module


def test_ranks_that_see_different_folders_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    module = two_ranks(finetuner(tiny_llama), all_gather=lambda seen: torch.tensor([1.0, float(seen)]))
    module.kept_in = tmp_path / "model"
    with pytest.raises(UserError, match="Some processes find the compressed base in .*model' and others do not"):
        module.load_base()


def test_the_others_meet_what_the_first_one_met(tiny_llama: Path) -> None:
    def refuse() -> str:
        raise AssertionError("the second rank is spared the work")

    assert two_ranks(finetuner(tiny_llama), broadcast=lambda own: "found")._of_first(refuse) == "found"
    error = UserError("The folder is damaged.")
    with pytest.raises(UserError, match="The folder is damaged"):
        two_ranks(finetuner(tiny_llama), broadcast=lambda own: error)._of_first(refuse)
