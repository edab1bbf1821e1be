import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.linears import PRECISIONS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.errors import UserError
from qpruner.memory import tensor_bytes
from qpruner.plan import DENSE, Precision
from qpruner.quantization.formats import dequantize, num_bytes
from qpruner.quantization.model import quantize_linears_, rebuild_linears_
from qpruner.quantization.packed import PackedLinear

TOKENS = torch.arange(12).view(2, 6)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Widths that pruning may leave, and biases."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=92,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def mixed(model: nn.Module) -> dict[str, Precision]:
    """Every format and dense ones, in turn over the linears of the layers."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    choices = [*PRECISIONS, DENSE]
    return {name: choices[index % len(choices)] for index, name in enumerate(names)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixed_model_makes_a_round_trip_through_one_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama(dtype)
    plan = mixed(model)
    before = logits(model)
    quantize_linears_(model, plan)
    expected = logits(model)
    assert not torch.equal(expected, before)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert {"model.layers.0.self_attn.q_proj.codes", "model.layers.0.self_attn.q_proj.bias"} <= state.keys()
    assert not any("absmax" in name or "quant" in name or "SCB" in name for name in state)
    again = llama(dtype)
    rebuild_linears_(again, plan, state)
    again.load_state_dict(state)
    assert torch.equal(logits(again), expected)


def test_bytes_of_the_model_are_those_of_the_plan() -> None:
    model = llama()
    plan = mixed(model)
    dense = tensor_bytes(model)
    weights = {name: model.get_submodule(name).weight for name, precision in plan.items() if precision != DENSE}
    quantize_linears_(model, plan)
    saved = sum(weight.nbytes - num_bytes(*weight.shape, plan[name]) for name, weight in weights.items())
    assert tensor_bytes(model) == dense - saved


def test_only_named_linears_change() -> None:
    model = llama()
    original = copy.deepcopy(model)
    quantize_linears_(model, {"model.layers.1.mlp.up_proj": Precision("int8", 8), "model.layers.0.mlp.up_proj": DENSE})
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert packed == ["model.layers.1.mlp.up_proj"]
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor)
        for name, tensor in original.state_dict().items()
        if "layers.1.mlp.up_proj" not in name
    )
    weight = original.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(dequantize(model.model.layers[1].mlp.up_proj), weight.data, rtol=0, atol=1e-3)


def test_a_dense_plan_leaves_no_mark() -> None:
    model = llama()
    quantize_linears_(model, dict.fromkeys(mixed(model), DENSE))
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_adapters_train_on_a_mixed_model_and_copies_and_evaluations_change_nothing() -> None:
    model = llama()
    quantize_linears_(model, mixed(model))
    model = attach_adapters(model, LoRAConfig(r=2, dropout=0.0), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)

    def gradients(model: nn.Module) -> list[Tensor]:
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    first = gradients(model)
    assert len(first) == 2 * 14 and all(gradient.abs().max() > 0 for gradient in first)
    logits(model.eval())
    copied = copy.deepcopy(model)
    logits(copied.eval())
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(model), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(copied), strict=True))


def test_rebuilding_reads_no_dense_weight(tmp_path: Path) -> None:
    model = llama()
    plan = mixed(model)
    quantize_linears_(model, plan)
    with torch.device("meta"):
        again = LlamaForCausalLM(model.config).eval()
    rebuild_linears_(again, plan, model.state_dict())
    again.load_state_dict(model.state_dict(), assign=True)
    assert not any(parameter.is_meta for parameter in again.parameters())
    again.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its buffers are in no state dict
    assert torch.equal(logits(again), logits(model))


def test_mistakes_are_said_before_anything_changes() -> None:
    model = llama()
    good = {"model.layers.0.mlp.up_proj": Precision("nf4", 4)}
    for bad, message in (
        ({"model.layers.0.mlp.upproj": Precision("nf4", 4)}, "Did you mean 'model.layers.0.mlp.up_proj'"),
        ({"model.norm": Precision("nf4", 4)}, "'model.norm' is not the name of a dense linear of LlamaForCausalLM"),
        ({"lm_head": Precision("nf4", 5)}, "nf4 has no 5 bits"),
    ):
        with pytest.raises(UserError, match=message):
            quantize_linears_(model, {**good, **bad})
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    quantize_linears_(model, good)
    with pytest.raises(UserError, match="is not the name of a dense linear"):
        quantize_linears_(model, good)


def test_files_of_another_plan_or_model_are_refused() -> None:
    model = llama()
    up, query = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    quantize_linears_(model, {up: Precision("nf4", 4), query: Precision("int8", 8)})
    state = model.state_dict()
    with pytest.raises(UserError, match=rf"{up}: The tensor 'codes' .*must be torch.int8"):
        rebuild_linears_(llama(), {up: Precision("int8", 8)}, state)
    without = {name: tensor for name, tensor in state.items() if name != f"{query}.bias"}
    with pytest.raises(UserError, match=rf"{query} lacks the bias in the file"):
        rebuild_linears_(llama(), {query: Precision("int8", 8)}, without)
    with pytest.raises(UserError, match=r"'codes' .* is missing"):
        rebuild_linears_(llama(), {up: Precision("nf4", 4)}, {})
