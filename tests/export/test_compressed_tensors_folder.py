"""Export to compressed-tensors: codes as they were, and a folder that transformers alone loads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import source_of
from support.families import random_tokens
from support.quantized import INT8, NF4

from qpruner.anatomy import FAMILIES
from qpruner.errors import UserError
from qpruner.export.compressed_tensors_folder import CompressedTensors
from qpruner.export.fidelity import logits
from qpruner.export.source import Source
from qpruner.files import read_json
from qpruner.plan import ROW, UNITS, Precision
from qpruner.tensor_files import load_tensors

FOUR, THREE, EIGHT = (Precision("symmetric", bits, group) for bits, group in ((4, 32), (3, 64), (8, -1)))
TWO = Precision("symmetric-double", 2, 128)
SYMMETRIC = [dict(zip(UNITS, units, strict=True)) for units in ((FOUR, EIGHT, TWO, THREE), (INT8, FOUR, FOUR, TWO))]
UNIFORM = [((0, 2, 3), tuple(range(64)))] * 2
"""Query heads whose channels are 96, which no Llama of transformers can have."""

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
packed = [name for name, _ in model.named_parameters() if name.endswith("weight_packed")]
tokens = torch.tensor(json.load(sys.stdin))
logits = model(input_ids=tokens).logits
again = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
assert "qpruner" not in sys.modules
print(json.dumps([type(model).__name__, len(packed), logits.tolist(), list(again.shape)]))
"""


def symmetric_source(folder: Path, family: str = "llama", **changes: Any) -> Source:
    return source_of(
        folder, family, kept=UNIFORM, precision=SYMMETRIC, num_hidden_layers=2, intermediate_size=128, **changes
    )


def loaded(folder: Path) -> Any:
    """Class, number of packed linears, logits of the `random_tokens`, and shape of what a new process generates."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        input=json.dumps(random_tokens().tolist()),
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_symmetric_codes_are_those_of_the_model(tmp_path: Path) -> None:
    source = symmetric_source(tmp_path / "m", "qwen2", head_dim=16)
    written = CompressedTensors().write(source, tmp_path / "out", torch.float16)
    for name in source.names():
        expected = source.weight(name).half().float()
        scales = source.network.get_submodule(name.rpartition(".")[0]) if name.endswith("weight") else None
        if getattr(scales, "precision", None) == INT8:  # of scales in float32
            torch.testing.assert_close(written.read(name), expected, rtol=2**-10, atol=2**-20)
        else:
            assert torch.equal(written.read(name), expected), name
    assert written.changes == (
        "1 linear of symmetric 3/64 became 4 bits with a scale per row, the codes as they were: the format has no 3",
    )
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    assert written.predicted_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_words_by_hand(tmp_path: Path) -> None:
    source = symmetric_source(tmp_path / "m")
    CompressedTensors().write(source, tmp_path / "out", torch.float16)
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    q = "model.layers.0.self_attn.q_proj"
    word, scale = tensors[f"{q}.weight_packed"][5, 1].item() % 2**32, tensors[f"{q}.weight_scale"][5, 0].float()
    codes = torch.tensor([word >> 4 * place & 15 for place in range(8)])  # weights 8 to 15 of row 5
    assert torch.equal(scale * (codes - 8), source.weight(f"{q}.weight")[5, 8:16])
    assert tensors[f"{q}.weight_shape"].tolist() == [96, 64]


def test_the_package_reads_the_same_codes(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    source = symmetric_source(tmp_path / "m")
    CompressedTensors().write(source, tmp_path / "out", torch.float16)
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    linear = "model.layers.1.mlp.down_proj"
    codes = helpers.unpack_from_int32(tensors[f"{linear}.weight_packed"], 2, torch.Size([64, 64]))
    scales = tensors[f"{linear}.weight_scale"].float()
    assert torch.equal(codes * scales, source.weight(f"{linear}.weight"))


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.slow), "qwen3"])
def test_transformers_alone_loads_and_generates(tmp_path: Path, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    source = symmetric_source(tmp_path / "m", family)
    written = CompressedTensors().write(source, tmp_path / "out", torch.float16)
    name, packed, values, shape = loaded(tmp_path / "out")
    assert name == {"llama": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    assert (packed, shape) == (14, [2, 15])
    expected = logits(source, written.read, random_tokens())
    assert (torch.tensor(values) - expected).norm() < 0.01 * expected.norm()  # which it computes in float16
    exact = logits(source, source.weight, random_tokens())
    assert (expected - exact).norm() < 0.002 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_of_widths_of_their_own_bring_the_code_that_builds_them(tmp_path: Path, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    kept = [((0, 2, 3), tuple(range(64))), ((1, 2), tuple(range(96)))]
    sizes = {"num_hidden_layers": 2, "intermediate_size": 128}
    source = source_of(tmp_path / "m", family, kept=kept, precision=FOUR, **sizes)
    written = CompressedTensors().write(source, tmp_path / "out", torch.float16)
    assert "trust_remote_code=True, by the code that lies in it" in written.changes[-1]
    name, packed, values, shape = loaded(tmp_path / "out")
    assert (name, packed, shape) == (f"Compressed{FAMILIES[family].model_class}", 14, [2, 15])
    expected = logits(source, written.read, random_tokens())
    assert (torch.tensor(values) - expected).norm() < 0.01 * expected.norm()


def test_each_scheme_is_a_group_that_matches_its_linears_alone(tmp_path: Path) -> None:
    source = symmetric_source(tmp_path / "m")
    CompressedTensors().write(source, tmp_path / "out", torch.float16)
    content = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert content["ignore"] == ["lm_head"]
    groups = content["config_groups"].values()
    schemes = {(group["weights"]["num_bits"], group["weights"]["group_size"]) for group in groups}
    assert len(schemes) == len(groups) == 4
    matching = {
        name: [group["weights"]["num_bits"] for group in groups for target in group["targets"] if matches(target, name)]
        for name, _ in source.network.named_modules()
    }
    assert matching["model.layers.0.self_attn.k_proj"] == matching["model.layers.0.self_attn.v_proj"] == [4]
    assert matching["model.layers.1.self_attn.q_proj"] == matching["model.layers.0.self_attn.o_proj"] == [8]
    assert matching["model.layers.0.mlp.gate_proj"] == matching["model.layers.1.mlp.down_proj"] == [2]
    assert matching["lm_head"] == matching["model.layers.0.mlp"] == []


@pytest.mark.parametrize(
    ("precision", "bits", "group"),
    [
        (Precision("symmetric", 2, 32), 4, 32),
        (Precision("symmetric", 2, ROW), 4, None),
        (THREE, 4, None),
        (FOUR, 4, 32),
        (EIGHT, 8, None),
    ],
)
def test_linears_that_engines_fuse_share_a_scheme_where_some_have_adapters(
    tmp_path: Path, precision: Precision, bits: int, group: int | None
) -> None:
    """Those without adapters keep their codes, if need be in more bits."""
    lora = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
    source = source_of(tmp_path / "m", precision=precision, lora=lora, intermediate_size=64)
    written = CompressedTensors().write(source, tmp_path / "out", torch.float16)
    groups = read_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"].values()
    for linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        name = f"model.layers.1.{linear}"
        (weights,) = [g["weights"] for g in groups if any(matches(target, name) for target in g["targets"])]
        assert (weights["num_bits"], weights["group_size"]) == (bits, group), name
        read, value = written.read(f"{name}.weight"), source.weight(f"{name}.weight")
        if linear in ("self_attn.k_proj", "mlp.gate_proj"):
            assert torch.equal(read, value.half().float()), name
        else:
            assert 0 < (read - value).norm() < 0.25 * value.norm(), name
    tensors = load_tensors(tmp_path / "out" / "model.safetensors")
    assert written.predicted_bytes == sum(tensor.nbytes for tensor in tensors.values())
    wider = (
        f"6 linears of {precision} became .* the codes as they were: engines fuse them with linears that have adapters"
    )
    assert any(re.match(wider, change) for change in written.changes) == (precision.bits == 2)


def matches(target: str, name: str) -> bool:
    return re.match(target.removeprefix("re:"), name) is not None


def test_what_it_cannot_say_is_encoded_anew_and_told(tmp_path: Path) -> None:
    """NF4, two bits with minima, an adapter, rows of no whole groups, and a packed embedding."""
    precision = dict(zip(UNITS, (NF4, FOUR, Precision("affine-double", 2, 32), FOUR), strict=True))
    lora = {"target_modules": ["o_proj"]}
    source = source_of(tmp_path / "m", precision=[precision] * 3, embedding=INT8, lora=lora)
    written = CompressedTensors().write(source, tmp_path / "out", torch.bfloat16)
    anew = "codes chosen anew"
    assert set(written.changes) == {
        f"9 linears of nf4 4/64 became 4 bits with a scale for 64 weights, {anew}: the format has no such codes",
        f"3 linears of symmetric 4/32 became 4 bits with a scale for 32 weights, {anew}: their adapters are in them",
        f"6 linears of affine-double 2/32 became 4 bits with a scale for 32 weights, {anew}: the format has no such "
        "codes",
        f"3 linears of symmetric 4/32 became 8 bits with a scale per row, {anew}: rows of 48 weights are no multiple "
        "of 32",
        "the embedding is dense, in bfloat16",
        "scales are rounded to bfloat16, whose steps are coarse; --dtype float16 holds them as they are",
    }
    for name, most in (("q_proj", 0.12), ("o_proj", 0.12)):
        name = f"model.layers.0.self_attn.{name}.weight"
        difference = written.read(name) - source.weight(name)
        assert 0 < difference.norm() < most * source.weight(name).norm()


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c_attn.* are no linears in transformers' own model"):
        CompressedTensors().check(source_of(tmp_path / "gpt2", "gpt2", precision=NF4))
    with pytest.raises(UserError, match=r"No linear .* is quantized. Export it with --format dense"):
        CompressedTensors().check(source_of(tmp_path / "dense"))
    tied = source_of(tmp_path / "tied", embedding=INT8, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"No linear .* is quantized"):
        CompressedTensors().check(tied)
    CompressedTensors().check(source_of(tmp_path / "head", head=INT8))
    CompressedTensors().check(source_of(tmp_path / "whole", kept=[((0, 1), (3, 4))] * 3, precision=NF4))
