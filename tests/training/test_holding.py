"""Which LightningModules callbacks that compress can act on."""

from pathlib import Path

import pytest
from lightning.pytorch import LightningModule
from support.fits import finetuner

from qpruner.training.holding import expect_holder


def test_a_module_that_holds_a_model_is_taken_before_the_model_is_there(tiny_llama: Path) -> None:
    module = finetuner(tiny_llama)
    assert expect_holder(module) is module and module.held is None


def test_another_module_of_that_kind_is_taken_too() -> None:
    class Gates(LightningModule):
        @property
        def compressed(self) -> None:
            raise AssertionError("nobody asked for the model")

        load_base = merge_inherited = keep_base = keep_adapters = lambda self: None

    module = Gates()
    assert expect_holder(module) is module


@pytest.mark.parametrize("module", [LightningModule(), None])
def test_any_other_is_named(module: object) -> None:
    with pytest.raises(TypeError, match=f"a module that holds a model, not on a {type(module).__name__}"):
        expect_holder(module)
