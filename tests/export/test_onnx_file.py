"""Export to ONNX, run by onnxruntime against torch."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.exports import source_of
from support.families import random_tokens
from support.quantized import DOUBLE, INT8, NF4
from torch import Tensor

from qpruner.errors import UserError
from qpruner.export.fidelity import logits
from qpruner.export.onnx_file import Onnx
from qpruner.export.source import Source
from qpruner.plan import DENSE, ROW, UNITS, Leading, Precision

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FOUR, THREE, EIGHT = Precision("symmetric", 4, 32), Precision("affine-double", 3, 64), Precision("affine", 8, ROW)
LEADING = Precision("symmetric", 4, 32, Leading(12, INT8))
MIXED = [
    dict(zip(UNITS, precisions, strict=True))
    for precisions in ((FOUR, INT8, EIGHT, THREE), (DOUBLE, LEADING, NF4, DENSE))
]
KEPT = [((0, 2, 3), tuple(range(44))), ((1, 3), tuple(range(3, 48, 2)))]
"""No two layers alike, and rows that are no multiples of groups."""


def session_of(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(session: Any, tokens: Tensor, past: list[Any] | None = None, mask: Tensor | None = None) -> Any:
    """Logits of tokens behind those of a cache, and the cache with them."""
    caches = [given for given in session.get_inputs() if given.name.startswith("past_key_values")]
    if past is None:
        past = [numpy.zeros((len(tokens), given.shape[1], 0, given.shape[3]), numpy.float32) for given in caches]
    before = past[0].shape[2]
    mask = torch.ones(len(tokens), before + tokens.shape[1], dtype=torch.int64) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    feeds = {name: value.contiguous().numpy() for name, value in inputs.items()}
    first, *present = session.run(None, feeds | {given.name: held for given, held in zip(caches, past, strict=True)})
    return torch.from_numpy(first), present


def check(source: Source, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a model, and compares what onnxruntime computes, at once and in parts, with torch."""
    written = Onnx().write(source, folder, dtype)
    session, tokens = session_of(folder), random_tokens(3, 11)
    expected = logits(source, written.read, tokens)
    whole, _ = step(session, tokens)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    parts, cache = [], None
    for part in tokens.split([6, 1, 4], dim=1):
        out, cache = step(session, part, cache)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(source, source.weight, tokens)).norm() < 0.01 * expected.norm()
    size = (folder / "model.onnx").stat().st_size
    assert written.predicted_bytes < size < written.predicted_bytes + 200_000  # its nodes


@pytest.mark.slow
def test_codes_adapters_and_widths_of_each_layer(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 2, "tie_word_embeddings": True}
    source = source_of(
        tmp_path / "m", "qwen2", kept=KEPT, precision=MIXED, embedding=THREE, lora={}, head_dim=16, **changes
    )
    check(source, tmp_path / "out")
    tokens, mask = random_tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    session = session_of(tmp_path / "out")
    padded, alone = step(session, tokens, mask=mask)[0][:1, 4:], step(session, tokens[:1, 4:])[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_products_are_made_with_codes(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    source = source_of(tmp_path / "m", precision=[MIXED[0]], num_hidden_layers=1, head=FOUR, embedding=INT8)
    written = Onnx().write(source, tmp_path / "out", torch.float16)
    assert written.changes[:2] == (
        "1 weight of affine-double 3/64 hold each code in 4 bits",
        "what is dense is in float16, and computed with in float32",
    )
    model = onnx.load(tmp_path / "out" / "model.onnx")
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    assert list(held["model.layers.0.self_attn.q_proj.weight.codes"].dims) == [128, 2, 16]
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    bits = [attribute.i for node in products for attribute in node.attribute if attribute.name == "bits"]
    assert bits == [4, 4, 4, 8, 8, 8, 4, 4]
    assert "DequantizeLinear" not in {node.op_type for node in model.graph.node}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "olmo2", "phi3", "gpt2"])
def test_families(tmp_path: Path, family: str) -> None:
    changes = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3_text" else {}
    source = source_of(
        tmp_path / "m", family, kept=KEPT, precision=MIXED, embedding=INT8, num_hidden_layers=2, **changes
    )
    check(source, tmp_path / "out", torch.bfloat16)


def test_formats_that_it_has_no_operator_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = source_of(tmp_path / "m", "llama", precision=INT8)
    Onnx().check(described)
    monkeypatch.setattr("qpruner.export.onnx_file.format_for", lambda precision: object())
    with pytest.raises(UserError, match="no operator for weights in int8.* Use --format dense"):
        Onnx().check(described)
