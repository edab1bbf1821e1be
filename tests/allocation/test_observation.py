import copy
import math
import warnings
from typing import Any

import pytest
import torch
from support.calibration import S, T, calibration, hooks_of, in_processes
from support.families import LAYERS, random_tokens, tiny_model
from torch import Tensor, nn

from qpruner.allocation import observation
from qpruner.allocation.mutual_information import MutualInformationConfig, mutual_information
from qpruner.allocation.observation import layer_information, observe
from qpruner.errors import UserError

CONFIG = MutualInformationConfig()
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
QUIET = pytest.mark.filterwarnings("ignore:In . of . layers most of the mutual information is chance")


def naive(model: Any) -> tuple[Tensor, Tensor]:
    """The blocks' outputs [L, S T, hidden] and the logits [S T, vocabulary], sequence by sequence."""
    bare = copy.deepcopy(model)
    bare.model.norm = nn.Identity()  # what is called the last hidden state is behind it
    with torch.no_grad():
        hidden = bare(input_ids=random_tokens(S, T), output_hidden_states=True, use_cache=False).hidden_states
        logits = model(input_ids=random_tokens(S, T), use_cache=False).logits
    return torch.stack(hidden[1:]).flatten(1, 2), logits.flatten(0, 1)


@FAMILIES
@pytest.mark.parametrize("summary", ["mean", "norm", "max"])
@pytest.mark.parametrize("size", [S, 4, 1])
def test_samples_are_those_of_the_hidden_states(family: str, summary: Any, size: int) -> None:
    model = tiny_model(family)
    hidden, logits = naive(model)
    expected = {"mean": hidden.mean(-1), "norm": hidden.square().sum(-1).sqrt(), "max": hidden.max(-1).values}[summary]
    outputs, tokens = observe(model, calibration(size), MutualInformationConfig(summary=summary))
    assert outputs.shape == (LAYERS, S * T)
    assert (outputs.dtype, tokens.dtype) == (torch.float64, torch.int64)
    torch.testing.assert_close(outputs.float(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens, logits.argmax(-1))
    assert len(tokens.unique()) > 5
    _, certainty = observe(model, calibration(size), MutualInformationConfig(prediction="log_probability"))
    assert certainty.dtype == torch.float64
    torch.testing.assert_close(certainty.float(), logits.softmax(-1).max(-1).values.log(), rtol=1e-4, atol=1e-5)


@QUIET
@FAMILIES
@pytest.mark.parametrize("estimator", ["histogram", "neighbours"])
@pytest.mark.parametrize("prediction", ["argmax", "log_probability"])
def test_information_is_that_of_each_layers_samples(family: str, estimator: Any, prediction: Any) -> None:
    model, config = tiny_model(family), MutualInformationConfig(estimator, prediction=prediction)
    outputs, predictions = observe(model, calibration(), config)
    found = layer_information(model, calibration(), config)
    assert found == [mutual_information(outputs[number], predictions, config) for number in range(LAYERS)]
    assert len(set(found)) > 1


@pytest.mark.parametrize(("size", "processes"), [(1, 2), (2, 2), (4, 2), (4, 3)])  # 4: two micro-batches, 4 and 2
@pytest.mark.parametrize("prediction", ["argmax", "log_probability"])
def test_the_number_of_processes_does_not_matter(size: int, processes: int, prediction: Any) -> None:
    config = MutualInformationConfig(prediction=prediction)
    outputs, predictions = observe(tiny_model("llama"), calibration(size), config)
    model = tiny_model("llama")
    for found in in_processes(processes, size, lambda given: observe(copy.deepcopy(model), given, config)):
        assert torch.equal(found[0], outputs)
        assert torch.equal(found[1], predictions)


@QUIET
def test_each_micro_batch_passes_once() -> None:
    model, rows = tiny_model("llama"), []
    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda _, args, number=number: rows.append((number, len(args[0]))))
    layer_information(model, calibration(4), CONFIG)
    # Recorded once for each micro-batch, then block by block.
    passes = [(number, size) for number in range(LAYERS) for size in (4, 2)]
    assert rows == sorted(passes, key=lambda one: -one[1]) + passes


def test_the_model_computes_in_the_given_context_without_gradients() -> None:
    model, types = tiny_model("llama"), []
    given = calibration(4, forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    with model.lm_head.register_forward_hook(
        lambda _, args, output: types.append((output.dtype, output.requires_grad))
    ):
        outputs, _ = observe(model, given, CONFIG)
    assert types == [(torch.bfloat16, False)] * 2
    exact, _ = observe(model, calibration(), CONFIG)
    torch.testing.assert_close(outputs, exact, rtol=0.1, atol=0.1)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    expected = observe(model, calibration(), CONFIG)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    found = observe(model, calibration(), CONFIG)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert [module.training for module in model.modules()] == modes
    assert hooks_of(model) == 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("prediction", ["argmax", "log_probability"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("broken", "named"),
    [("model.layers.1.mlp.down_proj", "output of layer 1"), ("lm_head", "logits")],
)
def test_what_is_not_finite_is_named(broken: str, named: str, value: float, prediction: Any) -> None:
    model = tiny_model("llama").train()
    model.get_submodule(broken).weight.data[3] = value
    with pytest.raises(UserError, match=rf"The {named} .* not finite"):
        observe(model, calibration(), MutualInformationConfig(prediction=prediction))
    assert hooks_of(model) == 0
    assert model.training


def test_an_error_in_the_pass_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama").train()
    with pytest.raises(IndexError):
        observe(model, calibration(tokens=random_tokens(S, T) + 1000), CONFIG)
    assert hooks_of(model) == 0
    assert all(module.training for module in model.modules())


def test_too_little_text_is_found_before_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.model, "forward", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(UserError, match="at least 32 samples, not 24"):
        observe(model, calibration(tokens=random_tokens(2, 12)), CONFIG)


def given_samples(monkeypatch: pytest.MonkeyPatch, outputs: Tensor, predictions: Tensor) -> list[str]:
    """What is warned of when these were observed."""
    monkeypatch.setattr(observation, "observe", lambda *_: (outputs, predictions))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer_information(None, calibration(), CONFIG)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("count", [100, 640])
def test_chance_is_warned_of_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    (message,) = given_samples(monkeypatch, torch.randn(4, count), torch.randint(100, (count,)))
    assert message.startswith("In 4 of 4 layers most of the mutual information is chance")
    assert f"{count} samples" in message


def test_only_layers_that_chance_explains_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, predictions = torch.randn(3, 2000), torch.randint(8, (2000,))
    outputs[0] += 3 * predictions
    outputs[2] += 4 * predictions
    (message,) = given_samples(monkeypatch, outputs, predictions)
    assert "In 1 of 3 layers" in message and "layer 1:" in message
    assert not given_samples(monkeypatch, outputs[::2], predictions)


def test_a_class_for_each_sample_is_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(given_samples(monkeypatch, torch.randn(2, 640), torch.arange(640))) == 1
