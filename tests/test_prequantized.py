"""Bases whose weights are quantized already."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bases import FOUR_BITS, copy_base, save_quantized
from support.families import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from qpruner.errors import UserError
from qpruner.pretrained import check_model, load_config, load_model

TOKENS = torch.arange(5, 25)[None]
EIGHT_BITS = {"load_in_8bit": True}


def dequantized(options: dict[str, Any], weight: Tensor) -> Tensor:
    """What bitsandbytes makes of a weight and back, by its own functions."""
    if options == EIGHT_BITS:
        # It rounds what it is given in half precision.
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        return bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(codes, state)


@pytest.mark.parametrize("options", [FOUR_BITS, EIGHT_BITS], ids=["4 bits", "8 bits"])
def test_weights_of_bitsandbytes_become_dense(options: dict[str, Any], tiny_llama: Path, tmp_path: Path) -> None:
    folder = save_quantized(tiny_llama, tmp_path / "base", **options)
    assert "quantization_config" in json.loads((folder / "config.json").read_text())
    check_model(str(folder), trust_remote_code=False)
    notes: list[str] = []
    model = load_model(str(folder), dtype="float32", trust_remote_code=False, say=notes.append)
    bits = 8 if options == EIGHT_BITS else 4
    assert notes == [f"{folder} is quantized (bitsandbytes, {bits} bits); its weights are made dense in float32."]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, linear in expected.named_modules():
        if name.endswith("_proj"):
            linear.weight.data = dequantized(options, linear.weight.data)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert not torch.equal(model(TOKENS).logits, dense(TOKENS).logits)

    # Nothing is left by which transformers or PEFT would take it for quantized, neither here nor in what is saved.
    traces = ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "quantization_method")
    assert not any(hasattr(model, trace) for trace in traces) and not getattr(model, "is_quantized", False)
    assert not hasattr(load_config(str(folder)), "quantization_config")
    model.save_pretrained(tmp_path / "again")
    assert "quantiz" not in (tmp_path / "again" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def in_fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections in one block of 128 x 128, divided by a scale, as DeepSeek's checkpoints hold them."""
    changed = dict(tensors)
    for name, weight in tensors.items():
        if "_proj" in name:
            scale = weight.abs().max() / 448
            changed[name] = (weight / scale).to(torch.float8_e4m3fn)
            changed[f"{name}_scale_inv"] = scale.reshape(1, 1)
    return changed


def test_weights_in_fp8_become_dense(tiny_llama: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    folder = copy_base(tiny_llama, tmp_path / "base", weights=in_fp8, quantization_config=quantization)
    check_model(str(folder), trust_remote_code=False)
    notes: list[str] = []
    model = load_model(str(folder), dtype="float32", trust_remote_code=False, say=notes.append)
    assert notes == [f"{folder} is quantized (fp8); its weights are made dense in float32."]
    stored, weights = load_file(folder / "model.safetensors"), model.state_dict()
    for name in stored:
        if f"{name}_scale_inv" in stored:
            torch.testing.assert_close(weights[name], stored[name].float() * stored[f"{name}_scale_inv"])
    assert "quantization_config" not in model.config.to_dict()


def in_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [E, in, out] as gpt-oss is published, and what they mean: blocks of 32 inputs share a power of two.

    Blocks [E, out, in / 32, 16] of two codes a byte, the lower one first; scales [E, out, in / 32], plus 127.
    """
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    blocks = weight.mT.unflatten(2, (-1, 32))  # [E, out, in / 32, 32]
    exponents = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = (blocks / exponents.exp2()).unsqueeze(-1).sub(values).abs().argmin(-1)
    meant = (values[codes] * exponents.exp2()).flatten(2).mT
    low, high = codes.unflatten(-1, (16, 2)).unbind(-1)
    return (high * 16 + low).to(torch.uint8), (exponents.squeeze(-1) + 127).to(torch.uint8), meant


def test_experts_in_mxfp4_become_dense(tmp_path: Path) -> None:
    stock = GptOssForCausalLM(tiny_config("gpt_oss", intermediate_size=32)).eval()
    stock.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    state = stock.state_dict()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], meant = in_mxfp4(tensors.pop(name))
        state[name].copy_(meant)
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "base/config.json").read_text())
    unconverted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": unconverted}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    check_model(str(tmp_path / "base"), trust_remote_code=False)
    notes: list[str] = []
    model = load_model(str(tmp_path / "base"), dtype="float32", trust_remote_code=False, say=notes.append)
    assert "is quantized (mxfp4)" in notes[0] and "made dense in float32" in notes[0]
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, stock(TOKENS).logits, rtol=1e-4, atol=1e-4)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto", "torchao", "bitnet", "exl2", None])
def test_methods_that_are_not_undone(method: str | None, tiny_llama: Path, tmp_path: Path) -> None:
    entry = {"quant_method": method, "bits": 4}
    folder = copy_base(tiny_llama, tmp_path / "base", quantization_config=entry)
    message = rf"base' is quantized already \({method or 'an unnamed method'}, 4 bits\), and dense weights can only be"
    for refuse in (
        lambda: load_model(str(folder), dtype="float32", trust_remote_code=False),
        lambda: check_model(str(folder), trust_remote_code=False),
        lambda: load_config(str(folder)),
    ):
        with pytest.raises(UserError, match=message):
            refuse()


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "bitsandbytes", **FOUR_BITS},
        EIGHT_BITS,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ],
    ids=["4 bits", "8 bits", "fp8"],
)
def test_dense_weights_under_an_entry_are_read_as_they_are(entry: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", quantization_config=entry)
    check_model(str(folder), trust_remote_code=False)
    notes: list[str] = []
    model = load_model(str(folder), dtype="float32", trust_remote_code=False, say=notes.append)
    assert len(notes) == 1 and "over dense weights; it is left out" in notes[0]
    expected = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize("entry", [[], [1], "fp8", 4, True])
def test_an_entry_that_is_no_object(entry: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", quantization_config=entry)
    for refuse in (
        lambda: load_model(str(folder), dtype="float32", trust_remote_code=False),
        lambda: check_model(str(folder), trust_remote_code=False),
        lambda: load_config(str(folder)),
    ):
        with pytest.raises(
            UserError, match=r"quantization_config in the config.json of .*base' is .*, which is not a JSON object"
        ):
            refuse()


def test_a_package_that_is_missing(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = copy_base(tiny_llama, tmp_path / "base", quantization_config=entry)
    with pytest.raises(UserError, match=r"bitsandbytes, 4 bits\), and a package is missing .*pip install .*Or do with"):
        check_model(str(folder), trust_remote_code=False)
