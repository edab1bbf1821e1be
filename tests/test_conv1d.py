"""A GPT-2 whose ``Conv1D`` became linears."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import adapted, logits_of, packed, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from qpruner.conv1d import conv1d_to_linear_
from qpruner.plan import Precision
from qpruner.pretrained import load_model
from qpruner.quantization.merging import merge_

FUSED = "transformer.h.1.attn.c_attn"


@pytest.fixture
def stock() -> Any:
    """As transformers makes it, with biases that are not zero."""
    torch.manual_seed(5)
    model = GPT2LMHeadModel(tiny_config("gpt2"))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def test_it_is_the_same_function_of_the_same_values(stock: Any) -> None:
    weight, bias = stock.get_submodule(FUSED).weight.clone(), stock.get_submodule(FUSED).bias
    expected = logits_of(stock)
    model = conv1d_to_linear_(stock)
    assert model is stock and not any(isinstance(module, Conv1D) for module in model.modules())
    linear = model.get_submodule(FUSED)
    assert type(linear) is nn.Linear and (linear.in_features, linear.out_features) == (64, 192)
    assert torch.equal(linear.weight, weight.T) and linear.bias is bias and not linear.training
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-5)


def test_its_state_dict_is_that_of_transformers(stock: Any) -> None:
    expected = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = conv1d_to_linear_(copy.deepcopy(stock))
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        state = one.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert all(tensor.is_contiguous() for tensor in state.values())
    stock.load_state_dict(model.state_dict())
    again = tiny_model("gpt2")
    before = dict(expected)
    for assign in (False, True):
        again.load_state_dict(expected, assign=assign)
        assert torch.equal(logits_of(again), logits_of(model))
        assert all(expected[name] is tensor for name, tensor in before.items())  # the one that was given is left alone


def test_what_is_saved_loads_in_transformers_and_here(stock: Any, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path / "stock")
    said: list[str] = []
    model = load_model(str(tmp_path / "stock"), dtype="float32", trust_remote_code=False, say=said.append).eval()
    assert type(model.get_submodule(FUSED)) is nn.Linear and not said
    model.save_pretrained(tmp_path / "saved")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "saved"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(stock))


def test_adapters_are_those_of_a_linear_and_merge(tmp_path: Path) -> None:
    model = adapted(tiny_model("gpt2"))
    layer = model.get_base_model().get_submodule(FUSED)
    assert layer.lora_A["default"].weight.shape == (3, 64) and layer.lora_B["default"].weight.shape == (192, 3)
    expected = logits_of(model)
    merged = merge_(copy.deepcopy(model), torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-4)


def test_peft_puts_its_adapters_on_the_conv1d_of_transformers(tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapted(tiny_model("gpt2"))
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        found = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(found), expected, rtol=1e-4, atol=1e-4)


def test_packed_it_is_what_any_linear_is_and_dense_again_transformers_own(tmp_path: Path) -> None:
    model = packed(tiny_model("gpt2"), Precision("int8", 8))
    expected = logits_of(model)
    assert model.state_dict()[f"{FUSED}.codes"].shape[0] == 192  # by output
    assert 0 < (expected - logits_of(tiny_model("gpt2"))).norm() / expected.norm() < 0.1
    merge_(model, torch.float32).save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_any_is_left_alone() -> None:
    model = tiny_model("llama")
    parameters = dict(model.named_parameters())
    assert conv1d_to_linear_(model) is model and not model._state_dict_hooks
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
