"""What transformers says of a model that it loaded, and what of it is a mistake."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.families import tiny_config, tiny_model
from transformers import BertConfig, LlamaConfig

from qpruner.errors import UserError
from qpruner.loading_info import (
    check_architecture,
    check_loaded,
    check_number_formats,
    check_tied,
    check_tied_in_files,
    mend_padding_,
)  # fmt: skip

Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def info(missing: Any = (), unexpected: Any = (), mismatched: Any = ()) -> dict[str, Any]:
    return {"missing_keys": set(missing), "unexpected_keys": set(unexpected), "mismatched_keys": set(mismatched)}


def refused(said: str, **kinds: Any) -> None:
    with pytest.raises(UserError) as caught:
        check_loaded("maker/x", tiny_model("llama"), info(**kinds))
    assert str(caught.value).startswith(
        "The weights of 'maker/x' are not those of the LlamaForCausalLM that its config.json describes: "
    )
    assert said in str(caught.value)


def test_a_model_that_was_loaded_in_whole_passes() -> None:
    assert check_loaded("x", tiny_model("llama"), info()) == ()


def test_heads_beside_that_of_the_language_model_are_left_out_and_named() -> None:
    heads = ["v_head.summary.weight", "score.weight"]
    assert check_loaded("x", tiny_model("llama"), info(unexpected=heads)) == ("score.weight", "v_head.summary.weight")


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        ({"missing": [Q]}, f"1 tensor ({Q}) missing. Give it the config.json that belongs to its weights"),
        ({"missing": list("dcba")}, "4 tensors (a, b, c, ...) missing"),
        # Of a part that the model has, by its name with the prefix of the trunk or without.
        ({"unexpected": ["model.layers.9.x"]}, "1 tensor (model.layers.9.x) in the file and not in the model"),
        ({"unexpected": ["layers.9.x", "v_head.x"]}, "1 tensor (layers.9.x) in the file and not in the model"),
        ({"missing": [Q], "unexpected": ["v_head.x"]}, "missing; 1 tensor (v_head.x) in the file"),  # that one?
        ({"mismatched": [(Q, (8, 4), (4, 4))]}, f"1 tensor ({Q} [8, 4] instead of [4, 4]) of another shape"),
        ({"missing": [HEAD]}, "Save it with its head, or set tie_word_embeddings to true"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_told(kinds: dict[str, Any], said: str) -> None:
    refused(said, **kinds)


def test_a_wrapper_that_the_model_was_saved_in_is_recognised() -> None:
    names = [Q, EMBEDDING]
    refused("put '_orig_mod.' before every name", missing=names, unexpected=[f"_orig_mod.{name}" for name in names])
    one = {"missing": names, "unexpected": [f"a.{Q}", f"b.{EMBEDDING}"]}  # two wrappers are none
    refused("Give it the config.json that belongs to its weights", **one)


def test_what_is_no_causal_language_model_is_refused() -> None:
    check_architecture("x", LlamaConfig(architectures=["LlamaForCausalLM"]))
    check_architecture("x", LlamaConfig(architectures=["LlamaModel"]))  # the trunk alone
    check_architecture("x", LlamaConfig(architectures=None))
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel"):
        with pytest.raises(UserError, match=f"'x' is a Llama{head} by its config.json, whose head predicts no next"):
            check_architecture("x", LlamaConfig(architectures=[f"Llama{head}"]))
    masked = BertConfig(architectures=["BertForMaskedLM"])
    with pytest.raises(UserError, match="BertForMaskedLM by its config.json"):
        check_architecture("x", masked)
    own = SimpleNamespace(model_type="own", architectures=["Own"], auto_map={"AutoModelForCausalLM": "own.Own"})
    check_architecture("x", own)
    with pytest.raises(UserError, match="is of type 'own', and transformers has no causal language model of that type"):
        check_architecture("x", SimpleNamespace(**vars(own) | {"auto_map": {"AutoModel": "own.Own"}}))


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_weights_in_integers_are_codes(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    name = f"{prefix}{Q.removeprefix('model.')}"
    right, codes = tmp_path / "right.safetensors", tmp_path / "codes.safetensors"
    save_file({name: torch.zeros(2, 2), f"{prefix}position_ids": torch.arange(3)}, right)  # which is no weight
    check_number_formats("x", model, [right])
    save_file({name: torch.zeros(2, 2, dtype=dtype)}, codes)
    with pytest.raises(UserError, match=rf"codes of quantized ones: 1 tensor \({name} in [A-Z0-9]+\)"):
        check_number_formats("x", model, [right, codes])


def test_a_head_that_is_tied_is_the_embedding(tmp_path: Path) -> None:
    tied, untied = tiny_model("llama"), tiny_model("llama", tie_word_embeddings=False)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    check_tied("x", tied)
    check_tied("x", untied)
    untied.config.tie_word_embeddings = True  # and the weights are two
    with pytest.raises(UserError, match="'x' says that head and embedding are tied .tie_word_embeddings."):
        check_tied("x", untied)


def test_a_head_that_is_tied_is_the_embedding_in_files_too(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    table = torch.arange(6.0).view(3, 2)
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]

    def stored(head: torch.Tensor | None, embedding: str = EMBEDDING) -> list[Path]:
        save_file({embedding: table, Q: table + 2}, paths[0])
        save_file({"x": table} if head is None else {HEAD: head}, paths[1])
        return paths

    check_tied_in_files("x", model, stored(table + 1))  # it is not said to be
    model.config.tie_word_embeddings = True
    for right in (stored(None), stored(table.clone()), stored(table.clone(), "embed_tokens.weight")):
        check_tied_in_files("x", model, right)
    for embedding in (EMBEDDING, "embed_tokens.weight"):
        with pytest.raises(UserError, match="a head with other values"):
            check_tied_in_files("x", model, stored(table + 1, embedding))


@pytest.mark.parametrize(("token", "mended"), [(None, None), (0, None), (99, None), (100, 100), (-1, -1)])
def test_a_padding_token_without_a_row_is_taken_out(token: int | None, mended: int | None) -> None:
    config = tiny_config("llama")
    assert config.vocab_size == 100
    config.pad_token_id = token
    assert mend_padding_(config) == mended
    assert config.pad_token_id == (token if mended is None else None)
