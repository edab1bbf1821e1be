"""Export to a file for llama.cpp: what it holds, and what llama.cpp makes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.engines import ask_llama_cpp
from support.exports import source_of
from support.families import random_tokens
from support.quantized import INT8, NF4

from qpruner.errors import UserError
from qpruner.export.fidelity import logits
from qpruner.export.gguf_architecture import architecture_for
from qpruner.export.gguf_file import Gguf
from qpruner.export.gguf_names import entries
from qpruner.export.source import Source
from qpruner.export.written import Written
from qpruner.files import read_json
from qpruner.plan import DENSE, Precision
from qpruner.pretrained import EMBEDDED, load_tokenizer

gguf: Any = pytest.importorskip("gguf")

S4, A5 = Precision("symmetric", 4, 32), Precision("affine-double", 5, 64)
UNIFORM = [((0, 2), tuple(range(40)))] * 3
PER_LAYER = [((0, 2, 3), tuple(range(40))), ((1, 3), tuple(range(3, 35))), ((0, 1, 2, 3), tuple(range(16)))]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
OF_GEMMA = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", UNIFORM, {}),
    "llama per layer": ("llama", PER_LAYER, {"attention_bias": True, "mlp_bias": True}),
    "llama 3 per layer": ("llama", PER_LAYER, {"rope_parameters": LLAMA3}),
    "llama slowed": ("llama", None, {"rope_parameters": LINEAR}),
    "mistral per layer": ("mistral", PER_LAYER, {"sliding_window": None}),
    "qwen2": ("qwen2", None, {"tie_word_embeddings": True}),
    "qwen2 of fewer heads": ("qwen2", UNIFORM, {}),
    "qwen2 per layer": ("qwen2", PER_LAYER, {}),
    "qwen3": ("qwen3", UNIFORM, {}),
    "qwen3 per layer": ("qwen3", PER_LAYER, {"tie_word_embeddings": True}),
    "gemma": ("gemma", UNIFORM, {}),
    "gemma2": ("gemma2", UNIFORM, {}),
    "granite": ("granite", UNIFORM, {"attention_bias": True}),
    "smollm3": ("smollm3", UNIFORM, {"no_rope_layers": [1, 1, 1]}),
    "gemma3": ("gemma3_text", UNIFORM, {"rope_parameters": OF_GEMMA}),
}


def written(source: Source, folder: Path, exporter: Gguf = Gguf(tokenizer=False), **options: Any) -> Written:  # noqa: B008
    return exporter.write(source, folder, options.get("dtype", torch.float32))


def kinds(folder: Path) -> dict[str, str]:
    """The type of each tensor of a model's file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_comes_back(tmp_path: Path, name: str) -> None:
    family, kept, changes = MODELS[name]
    source = source_of(tmp_path / "m", family, kept=kept, embedding=S4, lora={}, **changes)
    for exporter in (Gguf("merged", tokenizer=False), Gguf("beside", tokenizer=False)):
        read = written(source, tmp_path / exporter.adapters, exporter).read
        for parameter in source.names():
            torch.testing.assert_close(read(parameter), source.weight(parameter), rtol=1e-6, atol=1e-6)
    on_disk = tmp_path / "merged" / "model.gguf"
    predicted = written(source, tmp_path / "again", Gguf("merged", tokenizer=False)).predicted_bytes
    assert predicted < on_disk.stat().st_size < predicted + 6000


@pytest.mark.parametrize("name", MODELS)
def test_codes_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    """Where rows end within a block of 32, blocks are filled up; adapters lie beside."""
    family, kept, changes = MODELS[name]
    mixed = [{"qkv": S4, "o": A5, "gate_up": A5, "down": S4}] * 3
    source = source_of(tmp_path / "m", family, kept=kept, precision=mixed, lora={}, **changes)
    read = written(source, tmp_path / "out").read
    narrow = "self_attn.o_proj" if family == "qwen2" and kept == PER_LAYER else None  # 6 heads of 8 channels
    for parameter in source.names():
        exact = (
            source.adapter(parameter) is None and "norm" not in parameter
        )  # Gemma's lie around 0, the file's around 1
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(read(parameter), source.weight(parameter), **tolerance)
    types = kinds(tmp_path / "out")
    rounded = {name for name, kind in types.items() if kind == "F32" and "norm" not in name and "bias" not in name}
    dense = {"token_embd.weight", "output.weight", "rope_freqs.weight"}
    assert rounded - dense == ({"blk.0.attn_output.weight"} if narrow else set())


def test_rows_of_heads_are_in_the_order_of_llama_cpp(tmp_path: Path) -> None:
    """Channel 1 of a head is the one that rotates with channel 0, which is half a head further in transformers."""
    source = source_of(tmp_path / "m", kept=PER_LAYER)
    written(source, tmp_path / "out")
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    query = source.weight("model.layers.0.self_attn.q_proj.weight")
    ours = torch.tensor(held["blk.0.attn_q.weight"])
    for row, expected in ((0, 0), (1, 8), (2, 1), (15, 15), (16, 16), (17, 24)):
        assert torch.equal(ours[row], query[expected])
    assert torch.equal(
        torch.tensor(held["blk.0.attn_v.weight"]), source.weight("model.layers.0.self_attn.v_proj.weight")
    )


def test_what_is_changed_is_told(tmp_path: Path) -> None:
    mixed = [{"qkv": NF4, "o": INT8, "gate_up": S4, "down": DENSE}] * 3
    source = source_of(tmp_path / "m", precision=mixed, lora={"target_modules": ["gate_proj"]})
    assert written(source, tmp_path / "out", dtype=torch.float16).changes == (
        "the adapters of 3 tensors lie in adapter.gguf; llama.cpp adds them with --lora",
        "3 tensors of Q8_0 hold the model's own codes",
        "6 tensors of Q4_0 hold the model's own codes",
        "nf4 4/64 is rounded to Q8_0: blk.0.attn_q.weight, blk.0.attn_k.weight, blk.0.attn_v.weight and 6 more",
        "int8 8 is Q8_0 with scales of float16: blk.0.attn_output.weight, blk.1.attn_output.weight, "
        "blk.2.attn_output.weight",
        "there is no tokenizer; prompts are token ids",
    )
    types = kinds(tmp_path / "out")
    assert types["blk.0.attn_q.weight"] == "Q8_0" and types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.attn_norm.weight"] == "F32"
    merged = Gguf("merged", round_to="Q5_1", tokenizer=False)
    assert "symmetric 4/32 with its adapter is rounded to Q5_1: blk.0.ffn_gate.weight, blk.1.ffn_gate.weight, " \
        "blk.2.ffn_gate.weight" in written(source, tmp_path / "merged", merged).changes  # fmt: skip
    assert kinds(tmp_path / "merged")["blk.0.attn_q.weight"] == "Q5_1"


def test_heads_that_fill_no_block_stay_dense(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "qwen2", kept=PER_LAYER, precision=S4)
    changes = written(source, tmp_path / "out", dtype=torch.bfloat16).changes
    assert "symmetric 4/32 is BF16, as rows of 48 are no blocks of 32: blk.0.attn_output.weight" in changes


def test_adapters_have_the_rank_and_alpha_that_they_were_trained_with(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "qwen3", kept=PER_LAYER, tie_word_embeddings=True, lora={"r": 4, "alpha": 6.0})
    written(source, tmp_path / "out")
    file = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert file.fields["adapter.lora.alpha"].contents() == 6.0
    assert file.fields["general.type"].contents() == "adapter"
    held = {tensor.name: torch.tensor(tensor.data) for tensor in file.tensors}
    adapter = source.adapters["model.layers.0.mlp.up_proj"]
    assert torch.equal(held["blk.0.ffn_up.weight.lora_a"], adapter.lora_A)
    assert torch.equal(held["blk.0.ffn_up.weight.lora_b"], adapter.lora_B)
    assert held["blk.0.attn_qkv.weight.lora_a"].shape == (12, 64)  # of query, key and value below one another


def test_a_tied_head_with_an_adapter_has_it_within(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", tie_word_embeddings=True, lora={"target_modules": ["lm_head"]})
    read = written(source, tmp_path / "out").read
    assert not (tmp_path / "out" / "adapter.gguf").exists()
    assert torch.equal(read("lm_head.weight"), source.weight("lm_head.weight"))
    assert torch.equal(read("model.embed_tokens.weight"), source.base("lm_head.weight"))


def test_metadata_and_tokenizer_are_there(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = "{{ messages }}"
    source = source_of(tmp_path / "run/model", kept=PER_LAYER, tokenizer=tokenizer, vocab_size=2048)
    Gguf().check(source)
    written(source, tmp_path / "out", Gguf())
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "deci" and fields["general.name"] == "run"
    assert fields["deci.attention.head_count"] == [6, 4, 8]
    assert fields["tokenizer.ggml.pre"] == "gpt-2" and len(fields["tokenizer.ggml.tokens"]) == 2048
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.chat_template"] == "{{ messages }}"


def test_what_cannot_be_written_is_refused_before(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m")
    with pytest.raises(UserError, match=r"holds no tokenizer.*--tokenizer false"):
        Gguf().check(source)
    Gguf(tokenizer=False).check(source)
    with pytest.raises(UserError, match=r"--round_to is 'Q4_K'; it must be one of Q8_0"):
        Gguf(round_to="Q4_K", tokenizer=False).check(source)
    with torch.no_grad():
        source.network.lm_head.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"output.weight has values that float16 cannot hold.*bfloat16"):
        written(source, tmp_path / "out", dtype=torch.float16)


def test_each_tensor_stands_once(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", "qwen3", kept=PER_LAYER, tie_word_embeddings=True)
    tensors = list(entries(source, architecture_for(source)))
    assert len({entry.name for entry in tensors}) == len(tensors) == 2 + 3 * (1 + 2 + 1 + 2 + 3)
    assert sorted(part.parameter for entry in tensors for part in entry.parts) == sorted(source.names())
    assert read_json(tmp_path / "m" / "config.json")["model_type"] == "compressed_qwen3"


# What llama.cpp computes.


def computed(source: Source, folder: Path, place: Path) -> torch.Tensor:
    adapter = {"adapter": folder / "adapter.gguf"} if (folder / "adapter.gguf").exists() else {}
    tokens = random_tokens(2, 24).tolist()
    answer: torch.Tensor = ask_llama_cpp(place, model=folder / "model.gguf", tokens=tokens, **adapter)["logits"]
    return answer


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_logits_of_the_model(tmp_path: Path, name: str) -> None:
    pytest.importorskip("llama_cpp")
    family, kept, changes = MODELS[name]
    source = source_of(tmp_path / "m", family, kept=kept, lora={}, **changes)
    written(source, tmp_path / "out")
    expected = logits(source, source.weight, random_tokens(2, 24))
    difference = (computed(source, tmp_path / "out", tmp_path) - expected).norm() / expected.norm()
    assert difference < (2e-3 if family.startswith("gemma") else 2e-5)  # its GELU is a table of float16 there


@pytest.mark.parametrize("name", ["llama per layer", "qwen2 per layer", "qwen3 per layer", "gemma3"])
def test_llama_cpp_computes_with_codes(tmp_path: Path, name: str) -> None:
    """Its products round activations to 8 bits, which is all that its logits are off by."""
    pytest.importorskip("llama_cpp")
    family, kept, changes = MODELS[name]
    mixed = [{"qkv": S4, "o": A5, "gate_up": A5, "down": S4}] * 3
    source = source_of(tmp_path / "m", family, kept=kept, precision=mixed, embedding=S4, lora={}, **changes)
    written(source, tmp_path / "out")
    expected = logits(source, source.weight, random_tokens(2, 24))
    difference = (computed(source, tmp_path / "out", tmp_path) - expected).norm() / expected.norm()
    assert difference < 0.05
