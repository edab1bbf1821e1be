"""Bases as people have them: what is read of them, what is told, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bases import LFS_POINTER, copy_base
from transformers import AutoModelForCausalLM

from qpruner.errors import UserError
from qpruner.pretrained import (
    check_model,
    held_in,
    hold_in_,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
)
from qpruner.training.module import LoRAFinetuner

TOKENS = torch.arange(5, 25)[None]


def load(folder: Path, **options: Any) -> Any:
    return load_model(str(folder), **{"dtype": "float32", "trust_remote_code": False, **options})


def assert_refused(folder: Path, message: str) -> None:
    """By what loads the model, and by what only checks it."""
    for check in (load, lambda folder: check_model(str(folder), trust_remote_code=False)):
        with pytest.raises(UserError, match=message):
            check(folder)


# In which number format.


@pytest.mark.parametrize(
    ("stored", "held"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32), (None, torch.float32)],
)
def test_a_base_is_held_as_it_is_stored_unless_that_is_half_precision(
    tiny_llama: Path, tmp_path: Path, stored: str | None, held: torch.dtype
) -> None:
    model = load(tiny_llama)
    if stored is not None:
        hold_in_(model, getattr(torch, stored))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": stored}))
    loaded = load(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {held} == {loaded.dtype}
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name).double(), parameter.double()), name  # no digit is lost
    assert held_in(loaded.config, "auto") == held_in(load_config(str(tmp_path)), "auto") == held  # in memory, too
    assert held_in(loaded.config, "float16") == torch.float16 == load(tmp_path, dtype="float16").dtype
    module = LoRAFinetuner(base=str(tmp_path))
    module.load_base()
    assert module.model.dtype == held and module.hparams["dtype"] == "auto"


# Weights that are not those of config.json.


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model."])
def test_tensors_that_were_saved_inside_of_a_wrapper(wrapper: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", weights=lambda t: {f"{wrapper}{n}": w for n, w in t.items()})
    assert_refused(folder, rf"21 tensors \(lm_head.weight, .*missing; 20 tensors .*put '{wrapper}' before every name")


def test_the_report_of_transformers_is_not_printed_beside_the_error(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", tie_word_embeddings=False)
    assert_refused(folder, r"1 tensor \(lm_head.weight\) missing. Save it with its head, or set tie_word_embeddings")
    assert "REPORT" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"vocab_size": 2000},
            r"1 tensor \(model.embed_tokens.weight \[2048, 32\] instead of \[2000, 32\]\) of another",
        ),
        ({"vocab_size": 2100}, r"model.embed_tokens.weight \[2048, 32\] instead of \[2100, 32\]"),
        (
            {"intermediate_size": 40},
            r"6 tensors \(model.layers.0.mlp.down_proj.weight \[32, 48\] instead of \[32, 40\]",
        ),
        ({"num_hidden_layers": 1}, r"9 tensors \(model.layers.1.input_layernorm.weight, .* in the file and not in the"),
        ({"num_hidden_layers": 3}, r"9 tensors \(model.layers.2.input_layernorm.weight, .*\) missing"),
        ({"attention_bias": True}, r"8 tensors \(model.layers.0.self_attn.k_proj.bias, .*\) missing"),
    ],
)
def test_weights_of_another_shape(config: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path) -> None:
    assert_refused(copy_base(tiny_llama, tmp_path / "base", **config), message)


def test_a_bias_that_the_model_has_no_place_for(tiny_llama: Path, tmp_path: Path) -> None:
    bias = {"model.layers.0.mlp.up_proj.bias": torch.zeros(48)}
    folder = copy_base(tiny_llama, tmp_path / "base", weights=lambda tensors: tensors | bias)
    assert_refused(folder, r"1 tensor \(model.layers.0.mlp.up_proj.bias\) in the file and not in the model")


def test_codes_without_what_they_stand_for(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(
        tiny_llama, tmp_path / "base", weights=lambda t: {n: w.char() if "mlp" in n else w for n, w in t.items()}
    )
    assert_refused(folder, r"codes of quantized ones: 6 tensors \(model.layers.0.mlp.down_proj.weight in I8, ")


def test_a_head_of_its_own_where_it_is_said_to_be_tied(tiny_llama: Path, tmp_path: Path) -> None:
    embedding = "model.embed_tokens.weight"
    same = copy_base(tiny_llama, tmp_path / "same", weights=lambda t: t | {"lm_head.weight": t[embedding].clone()})
    assert torch.equal(load(same)(TOKENS).logits, load(tiny_llama)(TOKENS).logits)
    other = copy_base(tiny_llama, tmp_path / "other", weights=lambda t: t | {"lm_head.weight": t[embedding] + 1})
    assert_refused(other, "tied .*and the file has a head with other values. Set tie_word_embeddings")
    check_model(str(same), trust_remote_code=False)
    untied = copy_base(other, tmp_path / "untied", tie_word_embeddings=False)
    assert torch.equal(load(untied).lm_head.weight, load_file(other / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    ("weights", "config"),
    [
        (lambda t: {n.removeprefix("model."): w for n, w in t.items()}, {"architectures": ["LlamaModel"]}),
        (lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, {}),
        (lambda t: {n: w.bfloat16() for n, w in t.items()}, {"dtype": "bfloat16"}),
        (None, {"quantization_config": None}),
        (None, {"quantization_config": {}}),
    ],
    ids=["the trunk alone", "buffers of old times", "bfloat16", "no quantization", "empty quantization"],
)
def test_bases_that_are_unusual_and_right(weights: Any, config: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", weights=weights, **config)
    check_model(str(folder), trust_remote_code=False)
    model = load(folder, say=pytest.fail)
    expected = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    if config.get("dtype") == "bfloat16":
        hold_in_(hold_in_(expected, torch.bfloat16), torch.float32)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training and "quantization_config" not in model.config.to_dict()


def test_a_value_head_is_left_out_and_told(tiny_llama: Path, tmp_path: Path) -> None:
    head = {"v_head.summary.weight": torch.zeros(1, 32)}
    folder = copy_base(tiny_llama, tmp_path / "base", weights=lambda tensors: tensors | head)
    notes: list[str] = []
    model = load(folder, say=notes.append)
    assert torch.equal(model(TOKENS).logits, load(tiny_llama)(TOKENS).logits)
    assert notes == [f"{folder} has tensors beside its language model, which are left out: v_head.summary.weight."]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification by its config"),
        ({"model_type": "llava"}, "is of type 'llava', and transformers has no causal language model of that type"),
        ({"model_type": "dreamt"}, "Cannot load a model from .*base': .*model type `dreamt`.*Put right what is named"),
        ({"num_attention_heads": 5}, "hidden size .32. is not a multiple of the number of attention heads .5."),
    ],
)
def test_what_is_no_causal_language_model(config: Any, message: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", **config)
    assert_refused(folder, message)
    with pytest.raises(UserError, match=message.replace("a model from", "a configuration from")):
        load_config(str(folder))


# Files that are not what they should be.


def test_shards(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", without=("model.safetensors",))
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load(folder)(TOKENS).logits, load(tiny_llama)(TOKENS).logits)
    tensors = load_file(shards[-1])
    dropped = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, shards[-1])
    assert_refused(folder, rf"1 tensor \({dropped}\) missing")
    shards[-1].unlink()
    assert_refused(folder, f"lacks {shards[-1].name}, which its model.safetensors.index.json names")
    (folder / "model.safetensors.index.json").unlink()
    assert_refused(folder, f"holds '{shards[0].name}' and no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "weight_map"), ("[]", "must be an object"), ('{"weight_map": [1]}', "weight_map"), ("{", "Expecting")],
)
def test_an_index_that_is_none(content: str, said: str, tiny_llama: Path, tmp_path: Path) -> None:
    index = {"model.safetensors.index.json": content}
    folder = copy_base(tiny_llama, tmp_path / "base", without=("model.safetensors",), files=index)
    assert_refused(folder, rf"base/model.safetensors.index.json'.*{said}.* Fetch the file again")


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name_at_all(name: str) -> None:
    assert_refused(name, "The name of a model is empty. Give a model folder, a hub name or")


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_weights_that_were_cut_off(length: int, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base")
    (folder / "model.safetensors").write_bytes((tiny_llama / "model.safetensors").read_bytes()[:length])
    assert_refused(folder, r"base/model.safetensors' is no safetensors file, or was cut off \(")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(file: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", files={file: LFS_POINTER})
    assert_refused(folder, f"base/{file}' is a pointer of Git LFS.*git lfs pull")
    if file == "tokenizer.json":
        with pytest.raises(UserError, match="tokenizer.json' is a pointer of Git LFS"):
            load_tokenizer(str(folder))


def test_whatever_a_library_raises_names_the_base(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", files={"tokenizer.json": "{}", "config.json": "[1"})
    with pytest.raises(UserError, match="Cannot load a tokenizer from .*base': .*not a valid JSON file. Put right"):
        load_tokenizer(str(folder))
    with pytest.raises(UserError, match="Cannot load a configuration from .*base': .*not a valid JSON file. Put right"):
        load_config(str(folder))
    (folder / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(UserError, match="Cannot load a tokenizer from .*base': KeyError: 'added_tokens'. Put right"):
        load_tokenizer(str(folder))


def test_a_folder_without_a_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_base(tiny_llama, tmp_path / "base", without=("tokenizer*",))
    with pytest.raises(UserError, match=r"base' holds no tokenizer. Put that of the model there"):
        load_tokenizer(str(folder))
    load(folder)


def test_a_file_is_no_folder(tiny_llama: Path) -> None:
    with pytest.raises(
        UserError, match=r"tiny_llama/config.json' is a file. Give the folder of the model, such as '.*"
    ):
        load_config(str(tiny_llama / "config.json"))


# Padding.


@pytest.mark.parametrize("padding", [2048, 99999, -1])
def test_padding_that_the_embedding_has_no_row_for(padding: int, tiny_llama: Path, tmp_path: Path) -> None:
    files = {"generation_config.json": json.dumps({"pad_token_id": padding})}
    folder = copy_base(tiny_llama, tmp_path / "base", files=files, pad_token_id=padding)
    notes: list[str] = []
    model = load(folder, say=notes.append)
    assert notes == [f"{folder} names a padding token, {padding}, that its embedding has no row for; it is left out."]
    assert model.config.pad_token_id is load_config(str(folder)).pad_token_id is None
    assert torch.equal(model(TOKENS).logits, load(tiny_llama)(TOKENS).logits)
    model.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again", say=pytest.fail).config.pad_token_id is None


# The hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the hub model ``org/name`` in a cache of its own, without the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = tmp_path / "hub" / "models--org--name"
    commit = "a" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    return model / "snapshots" / commit


def test_hub_models(hub: Path, tiny_llama: Path) -> None:
    copy_base(tiny_llama, hub)
    check_model("org/name", trust_remote_code=False)
    model = load_model("org/name", dtype="float32", trust_remote_code=False, say=pytest.fail)
    assert torch.equal(model(TOKENS).logits, load(tiny_llama)(TOKENS).logits)
    assert model_fingerprint("org/name") == model_fingerprint(str(tiny_llama))


def test_a_hub_model_of_adapters(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "maker/base"}))
    for read in (load_config, load_tokenizer):
        with pytest.raises(UserError, match=r"'org/name' holds adapters of PEFT .*give their base, 'maker/base'"):
            read("org/name")


def test_a_hub_model_without_safetensors(hub: Path, tiny_llama: Path) -> None:
    copy_base(tiny_llama, hub, without=("*.safetensors",), files={"pytorch_model.bin": ""})
    with pytest.raises(UserError, match="'org/name': it has no safetensors, and other formats, which may run code"):
        load_model("org/name", dtype="float32", trust_remote_code=False)
    assert model_fingerprint("org/name") is None


@pytest.mark.parametrize("name", ["org/none", "no name at all", "a--b..c"])
def test_names_that_the_hub_does_not_know(name: str, hub: Path) -> None:
    with pytest.raises(UserError, match=f"Cannot load a configuration from '{name}': .* Give a folder in the Hugging"):
        load_config(name)
    assert model_fingerprint("org/none") is None
