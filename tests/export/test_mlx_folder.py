"""Export to the folder of mlx-lm, and what mlx computes with it on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import source_of
from support.families import random_tokens
from support.quantized import INT8, NF4
from torch import Tensor
from transformers import AutoTokenizer

from qpruner.errors import UserError
from qpruner.export.fidelity import logits
from qpruner.export.mlx_folder import Mlx
from qpruner.export.source import Source
from qpruner.files import read_json
from qpruner.plan import DENSE, ROW, UNITS, Precision
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.tensor_files import load_tensors

THREE, SIX, TWO = Precision("affine-double", 3, 64), Precision("affine", 6, 32), Precision("symmetric", 2, ROW)
FOUR, ONE, FIVE = Precision("symmetric-double", 4, 32), Precision("affine", 1, 32), Precision("affine", 5, 128)
GRIDS = [dict(zip(UNITS, units, strict=True)) for units in ((THREE, SIX, TWO, FOUR), (FOUR, ONE, FIVE, INT8))]
UNIFORM = [((0, 2), tuple(range(96)))] * 2
KEPT = [((0, 2), tuple(range(96))), ((1, 0, 2, 3), tuple(range(64)))]

COMPUTE = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
model.set_dtype(mx.float32)
tokens = mx.array(json.load(sys.stdin))
cache = make_prompt_cache(model)
parts = [model(part, cache=cache) for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])]
print(json.dumps([type(model).__module__, model(tokens).tolist(), mx.concatenate(parts, 1).tolist()]))
"""


def grids(folder: Path, family: str = "llama", kept: Any = UNIFORM, **changes: Any) -> Source:
    """A model of codes at equal distances, of all numbers of bits."""
    sizes = {"num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16} | changes
    return source_of(folder, family, kept=kept, precision=GRIDS, embedding=SIX, **sizes)


def computed(folder: Path) -> tuple[str, Tensor, Tensor]:
    """The module of mlx-lm's model, and its logits of the `random_tokens`, at once and in parts behind a cache."""
    pytest.importorskip("mlx_lm")
    done = subprocess.run(
        [sys.executable, "-c", COMPUTE, str(folder)],
        input=json.dumps(random_tokens().tolist()),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, whole, parts = json.loads(done.stdout)
    return module.rpartition(".")[2], torch.tensor(whole), torch.tensor(parts)


@pytest.mark.parametrize(
    ("family", "kept", "module"),
    [
        ("llama", UNIFORM, "llama"),
        ("qwen2", UNIFORM, "llama"),
        ("qwen3", UNIFORM, "qwen3"),
        ("llama", KEPT, "openelm"),
        ("qwen3", KEPT, "openelm"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_mlx_computes_what_the_model_does(tmp_path: Path, family: str, kept: Any, module: str, tied: bool) -> None:
    """Up to the rounding of dense vectors and of the scales of int8."""
    source = grids(tmp_path / "m", family, kept, tie_word_embeddings=tied)
    written = Mlx().write(source, tmp_path / "out", torch.float16)
    expected = logits(source, source.weight, random_tokens())
    read = logits(source, written.read, random_tokens())
    assert (read - expected).norm() < 0.002 * expected.norm()
    name, whole, parts = computed(tmp_path / "out")
    assert name == module
    torch.testing.assert_close(whole, read, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(parts, read, rtol=1e-3, atol=1e-3)


def test_codes_are_those_of_the_model(tmp_path: Path) -> None:
    source = grids(tmp_path / "m", "qwen3", KEPT, tie_word_embeddings=True)
    written = Mlx().write(source, tmp_path / "out", torch.float16)
    assert written.changes == ("1 weight of affine 1/32 hold each code in 2 bits",)
    for name in source.names():
        value, module = source.weight(name), source.packed(name.rpartition(".")[0])
        if module is None or module.precision == INT8:
            torch.testing.assert_close(written.read(name), value, rtol=2**-10, atol=2**-12)
        else:
            torch.testing.assert_close(written.read(name), value, rtol=1e-6, atol=1e-7)
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    assert written.predicted_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors["transformer.layers.1.attn.qkv_proj.weight"].shape == (16 * (8 + 4 + 4), 64 * 4 // 32)


def test_the_package_unpacks_the_same_values(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    source = grids(tmp_path / "m")
    Mlx().write(source, tmp_path / "out", torch.float16)
    tensors = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for linear, bits, size in (("self_attn.v_proj", 3, 64), ("self_attn.o_proj", 6, 32), ("mlp.gate_proj", 2, 64)):
        linear = f"model.layers.0.{linear}"
        packed = tensors[f"{linear}.weight"], tensors[f"{linear}.scales"], tensors[f"{linear}.biases"]
        packed = [packed[0], *(each.astype(mx.float32) for each in packed[1:])]
        values = torch.tensor(mx.dequantize(*packed, group_size=size, bits=bits).tolist())
        torch.testing.assert_close(values, source.weight(f"{linear}.weight"), rtol=1e-6, atol=1e-7)


def test_the_configuration_says_widths_and_bits(tmp_path: Path) -> None:
    Mlx().write(grids(tmp_path / "m", kept=KEPT), tmp_path / "out", torch.float16)
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["num_query_heads"], config["num_kv_heads"]) == ([4, 8], [2, 4])
    assert config["ffn_multipliers"] == [1.5, 1.0] and config["normalize_qk_projections"] is False
    quantization = config["quantization"]
    assert quantization["transformer.layers.0.attn.qkv_proj"] == {"group_size": 64, "bits": 3}
    assert quantization["transformer.layers.1.ffn.proj_2"] == {"group_size": 64, "bits": 8}


def test_transformers_loads_the_tokenizer_beside_any_heads(tmp_path: Path) -> None:
    tokenizer, vocabulary = load_tokenizer(EMBEDDED), 1024
    kept = [((0, 1, 2), tuple(range(96)))] * 2
    source = grids(tmp_path / "m", kept=kept, tokenizer=tokenizer, vocab_size=vocabulary)
    Mlx().write(source, tmp_path / "out", torch.float16)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("Once upon a time")["input_ids"] == tokenizer("Once upon a time")["input_ids"]


def test_what_it_cannot_say_is_encoded_anew_and_told(tmp_path: Path) -> None:
    precision = dict(zip(UNITS, (NF4, SIX, DENSE, THREE), strict=True))
    source = source_of(tmp_path / "m", precision=[precision] * 3, lora={"target_modules": ["o_proj"]})
    written = Mlx().write(source, tmp_path / "out", torch.bfloat16)
    assert written.changes == (
        "9 weights of nf4 4/64 became 4 bits with a scale for 32 weights, codes chosen anew: the format has no such "
        "codes",
        "3 weights of affine 6/32 became 6 bits with a scale for 32 weights, codes chosen anew: their adapters are in "
        "them",
        "3 weights of affine-double 3/64 became dense: rows of 48 weights are no multiple of 32",
        "scales and minima are rounded to bfloat16; --dtype float16 holds them as they are",
    )
    for name, most in (("self_attn.q_proj", 0.1), ("self_attn.o_proj", 0.03), ("mlp.down_proj", 0.004)):
        name = f"model.layers.0.{name}.weight"
        difference = written.read(name) - source.weight(name)
        assert 0 < difference.norm() < most * source.weight(name).norm()


@pytest.mark.parametrize(
    ("family", "kept", "changes", "message"),
    [
        ("gemma", None, {}, r"no model that computes what a gemma does; llama, .* --format onnx or dense\."),
        ("qwen2", KEPT, {"head_dim": 16}, r"qwen2 does whose layers differ in width.* selection.uniform true"),
        ("mistral", None, {}, r"a window of 8 tokens"),
        ("llama", KEPT, {"attention_bias": True}, r"have biases, which OpenELM has not"),
        (
            "llama",
            KEPT,
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            r"of type linear; mlx gets default\.",
        ),
        ("llama", None, {"hidden_act": "gelu"}, r"FFNs is gelu; mlx computes silu in every llama\. .* --format onnx"),
        ("qwen3", KEPT, {"hidden_act": "relu"}, r"FFNs is relu; mlx computes silu in every qwen3\."),
        ("qwen3", None, {"attention_bias": True}, r"has biases, which mlx's qwen3 has not\. .* --format onnx or dense"),
    ],
)
def test_what_it_cannot_hold_is_refused(
    tmp_path: Path, family: str, kept: Any, changes: dict[str, Any], message: str
) -> None:
    kept = kept and [*kept, kept[0]]
    source = source_of(tmp_path / "m", family, kept=kept, intermediate_size=128, **changes)
    with pytest.raises(UserError, match=message):
        Mlx().check(source)


def test_the_same_activation_by_its_other_name_is_exported(tmp_path: Path) -> None:
    Mlx().check(source_of(tmp_path / "m", "llama", hidden_act="swish"))
