"""A callback's docstring says when it acts, hook by hook, and its YAML is one that works."""

import re
import textwrap
from inspect import getdoc

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

import qpruner.callbacks
from qpruner.callbacks import (
    GridPolishing,
    KeepModel,
    LoRAGuidedPruning,
    MixedPrecisionQuantization,
    StructuredPruning,
)

CLASSES = [getattr(qpruner.callbacks, name) for name in qpruner.callbacks.__all__ if name != "Compression"]


@pytest.mark.parametrize("callback", CLASSES, ids=lambda callback: callback.__name__)
def test_each_hook_that_acts_is_told(callback: type[Callback]) -> None:
    acting = {
        name
        for kind in callback.__mro__
        if kind.__module__.startswith("qpruner.callbacks")
        for name in vars(kind)
        if hasattr(Callback, name) and not name.startswith("__") and name != "state_key"
    }
    told = {
        name for line in re.findall(r"^(\w+(?:, \w+)*)$", getdoc(callback) or "", re.M) for name in line.split(", ")
    }
    assert acting and acting <= told


@pytest.mark.parametrize(
    "callback", [StructuredPruning, MixedPrecisionQuantization, LoRAGuidedPruning, GridPolishing, KeepModel]
)
def test_the_example_makes_the_callback(callback: type[Callback]) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", getdoc(callback) or "", re.S)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.callbacks", type=list[Callback])
    given = parser.parse_object(yaml.safe_load(textwrap.dedent(example)))
    made = parser.instantiate_classes(given).trainer.callbacks
    assert type(made[-1]) is callback
