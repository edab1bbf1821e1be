"""Architectures of llama.cpp."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import source_of
from support.families import KEPT
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qpruner.errors import UserError
from qpruner.export.gguf_architecture import added_channels, architecture_for, metadata, rope_factors
from qpruner.plan import DENSE, UNITS, Precision

UNIFORM = [((0, 2), tuple(range(32)))] * 3
FEWER_CHANNELS = [((0, 1, 2, 3), tuple(range(32)))] * 3
S4 = Precision("symmetric", 4, 32)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "kept", "changes", "name"),
    [
        ("llama", UNIFORM, {}, "llama"),
        ("mistral", None, {}, "llama"),
        ("llama", KEPT, {}, "deci"),
        ("mistral", KEPT, {}, "deci"),
        ("qwen2", FEWER_CHANNELS, {}, "qwen2"),
        ("qwen2", UNIFORM, {}, "llama"),  # whose heads need not fill the hidden size
        ("qwen2", KEPT, {}, "deci"),
        ("qwen3", UNIFORM, {}, "qwen3"),
        ("qwen3", KEPT, {"tie_word_embeddings": True}, "openelm"),
        ("gemma", UNIFORM, {}, "gemma"),
        ("gemma2", UNIFORM, {}, "gemma2"),
        ("gemma3_text", UNIFORM, {}, "gemma3"),
        ("granite", UNIFORM, {}, "granite"),
        ("smollm3", UNIFORM, {"no_rope_layers": [1, 1, 1]}, "smollm3"),
    ],
)
def test_the_architecture_follows_from_widths(
    tmp_path: Path, family: str, kept: Any, changes: dict[str, Any], name: str
) -> None:
    assert architecture_for(source_of(tmp_path / "m", family, kept=kept, **changes)).name == name


@pytest.mark.parametrize(
    ("family", "kept", "changes", "said"),
    [
        ("qwen3", KEPT, {}, r"head is not its embedding.*`selection.uniform: true`.*--format dense"),
        ("gemma3_text", KEPT, {}, r"equally wide.*`selection.uniform: true`"),
        ("granite", KEPT, {}, r"equally wide.*`selection.uniform: true`"),
        ("olmo2", None, {}, r"olmo2.*only llama, .*, gemma3_text, .* are written so far.*--format dense"),
        ("smollm3", None, {}, r"every fourth"),  # the second of its three layers has no positions
        ("gemma2", None, {"attn_logit_softcapping": None}, r"capped"),
        ("gemma3_text", None, {"attn_logit_softcapping": 50.0}, r"capped"),
        ("gemma", None, {"tie_word_embeddings": False}, r"head is not its embedding"),
        ("llama", None, {"hidden_act": "relu"}, r"relu.*--format dense"),
        ("qwen3", None, {"attention_bias": True}, r"biases"),
        ("gemma3_text", None, {"query_pre_attn_scalar": 32}, r"query_pre_attn_scalar.* 32"),
        ("qwen3", None, {"rope_parameters": LLAMA3}, r"llama3"),
    ],
)
def test_what_no_architecture_computes_is_refused(
    tmp_path: Path, family: str, kept: Any, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        architecture_for(source_of(tmp_path / "m", family, kept=kept, **changes))


def test_widths_are_stated_layer_by_layer(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", kept=KEPT)
    values, changes = metadata(source, architecture_for(source))
    assert values["attention.head_count"] == [6, 2, 8] and values["attention.head_count_kv"] == [3, 1, 4]
    assert values["feed_forward_length"] == [37, 23, 1]
    assert values["attention.key_length"] == values["rope.dimension_count"] == 16
    assert values["rope.freq_base"] == 10000.0 and values["context_length"] == 128
    assert not changes


def test_packed_rows_are_filled_up_to_blocks(tmp_path: Path) -> None:
    precision = [dict.fromkeys(UNITS, DENSE)] * 2 + [dict.fromkeys(UNITS, DENSE) | {"down": S4}]
    source = source_of(tmp_path / "m", kept=KEPT, precision=precision)
    assert [added_channels(source, layer) for layer in range(3)] == [27, 9, 31]
    values, changes = metadata(source, architecture_for(source))
    assert values["feed_forward_length"] == [64, 32, 32]
    assert changes == ["the layers have 67 FFN channels of zeros more, so that rows are whole blocks of 32"]


def test_a_sliding_window_ends_the_context(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "mistral")  # whose window is 8 tokens
    values, changes = metadata(source, architecture_for(source))
    assert values["context_length"] == 8
    assert changes == ["the context is 8 tokens: llama has no sliding window, which begins there"]
    gemma = source_of(tmp_path / "n", "gemma3_text")
    values, changes = metadata(gemma, architecture_for(gemma))
    assert values["attention.sliding_window"] == 8 and values["context_length"] == 128 and not changes
    assert values["attention.sliding_window_pattern"] == [True, False, True]


def test_frequencies_are_slowed_as_transformers_does(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", rope_parameters=LLAMA3)
    factors = rope_factors(source.config, 16)
    assert factors is not None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](source.config, torch.device("cpu"))
    torch.testing.assert_close(10000.0 ** -(torch.arange(0, 16, 2) / 16) / factors, frequencies, rtol=1e-5, atol=0)
    assert 1 == factors[0] < factors[1:-1].max() and factors[-1] == 8
    assert rope_factors(source_of(tmp_path / "n").config, 16) is None
