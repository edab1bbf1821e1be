"""Changes from the sums of the dense model, against those from text that passes through the narrowed one."""

import pytest
import torch
from support.calibration import calibration
from support.families import KEPT, LAYERS, random_tokens, tiny_model
from torch import Tensor

from qpruner.anatomy import decoder_layers
from qpruner.pruning.compensation import compensate_, shared_copy
from qpruner.pruning.dense_sums import fit_without, gather_sums
from qpruner.pruning.surgery import narrow_

TEXT = random_tokens(24, 20)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "olmo2"])
def test_changes_are_those_of_a_local_compensation_on_text(family: str) -> None:
    """With biases and without, with norms behind linears and without."""
    dense = tiny_model(family).requires_grad_(False)
    narrow = shared_copy(dense)
    narrow_(narrow, KEPT)
    expected = compensate_(narrow, dense, KEPT, calibration(5, TEXT), "local")
    sums: dict[int, dict[str, Tensor]] = {}
    gather_sums(dense, calibration(7, TEXT), sums.__setitem__)
    assert list(sums) == list(range(LAYERS))
    layers = zip(decoder_layers(dense), decoder_layers(narrow), KEPT, strict=True)
    for number, (layer, changed, (groups, channels)) in enumerate(layers):
        for coupled, units in ((layer.group_weights[-1], groups), (layer.channel_weights[-1], channels)):
            linear, other = coupled.linear, getattr(changed, coupled.name)
            stay = coupled.places(units)
            given = {name: tensor.double() for name, tensor in sums[number].items()}
            before = {name: tensor.clone() for name, tensor in given.items()}
            change, fit = fit_without(given, coupled.name, linear.weight, stay, bias=linear.bias is not None)
            assert all(torch.equal(given[name], tensor) for name, tensor in before.items())  # for the next plan
            on_text = expected[f"{number}.{coupled.name}"]
            assert fit.ridge == on_text.ridge
            assert fit.before == pytest.approx(on_text.before, rel=1e-4)
            assert fit.after == pytest.approx(on_text.after, rel=1e-4)
            assert (change is not None) == on_text.changes
            if change is not None:
                moved = other.weight.double() - linear.weight[:, stay].double()
                torch.testing.assert_close(moved, change.weight, rtol=1e-3, atol=1e-5)
                if change.bias is not None:
                    torch.testing.assert_close((other.bias - linear.bias).double(), change.bias, rtol=1e-3, atol=1e-5)
