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
    for number, (layer, (groups, channels)) in enumerate(zip(decoder_layers(dense), KEPT, strict=True)):
        for coupled, units in ((layer.group_weights[-1], groups), (layer.channel_weights[-1], channels)):
            linear = coupled.linear
            stay = coupled.places(units)
            change = fit_without(sums[number], coupled.name, linear.weight, stay, bias=linear.bias is not None)
            other = expected[f"{number}.{coupled.name}"]
            assert change.ridge == other.ridge
            assert change.before == pytest.approx(other.before, rel=1e-4)
            assert change.after == pytest.approx(other.after, rel=1e-4)
            if other.change is not None:
                assert change.change is not None
                torch.testing.assert_close(change.change.weight, other.change.weight, rtol=1e-3, atol=1e-5)
                if other.change.bias is not None:
                    torch.testing.assert_close(change.change.bias, other.change.bias, rtol=1e-3, atol=1e-5)
