"""What a model writes: the measures by hand, and the tokens against whole forward passes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import adapted, each_of, logits_of, random_tokens
from support.quantized import MIXED, pruned
from torch import Tensor, nn

import qpruner
from qpruner.adapter_files import save_adapters
from qpruner.anatomy import FAMILIES
from qpruner.errors import UserError
from qpruner.evaluation.generation import PROMPTS, continue_greedily, distinct, generate_samples, repetition
from qpruner.model_folder import save_base
from qpruner.pretrained import EMBEDDED, load_model, load_tokenizer
from qpruner.quantization.apply import quantize_


@pytest.mark.parametrize(
    ("tokens", "shares"),
    [
        ([1, 2, 1, 2, 1], (2 / 5, 2 / 4, 2 / 3, 2 / 2)),
        ([7] * 8, (1 / 8, 1 / 7, 1 / 6, 1 / 5)),
        ([1, 2, 3, 4, 5], (1.0, 1.0, 1.0, 1.0)),
        ([1, 1], (0.5, 1.0, 0.0, 0.0)),  # no n-gram of 3 or 4
        ([], (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_distinct_is_the_share_of_different_n_grams(tokens: list[int], shares: tuple[float, ...]) -> None:
    assert tuple(distinct(tokens, n) for n in range(1, 5)) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 6], 4 / 10),  # the second 1, 2, 3, 4
        ([7] * 10, 9 / 10),  # all but the first
        ([1, 2, 3, 1, 2, 3, 1, 2, 3], 6 / 9),  # from the second 1, 2, 3, 1 on
        ([1, 2, 3, 9, 1, 2, 3, 8], 0.0),  # three alike are not four
        ([1, 1, 1], 0.0),
        ([], 0.0),
    ],
)
def test_repetition_is_the_share_of_tokens_in_n_grams_that_came_before(tokens: list[int], share: float) -> None:
    assert repetition(tokens) == pytest.approx(share)


def test_repetition_of_other_lengths() -> None:
    assert repetition([1, 2, 3, 1, 2], n=2) == pytest.approx(2 / 5)
    assert repetition([1, 2, 1], n=1) == pytest.approx(1 / 3)


@each_of(FAMILIES)
def test_pruned_and_packed_models_write_with_their_cache_as_without(family: str, tmp_path: Path) -> None:
    """Each layer has another number of key-value heads; sliding windows are shorter than the text."""
    model, plan = pruned(family, MIXED)
    quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    save_adapters(tmp_path / "model", adapted(model), trained=True)
    loaded = qpruner.load_compressed(tmp_path / "model")
    seen: list[Tensor] = []
    hook = loaded.register_forward_hook(lambda module, given, output: seen.append(output.logits[0]))
    tokens = random_tokens(1, 6)[0].tolist()
    written = continue_greedily(loaded, tokens, max_new_tokens=14, ends=())
    hook.remove()
    assert [len(logits) for logits in seen] == [6] + [1] * 13  # only what is new passes the model
    expected = logits_of(loaded, torch.tensor([tokens + written[:-1]]))[0, 5:]
    torch.testing.assert_close(torch.stack([logits[-1] for logits in seen]), expected, rtol=1e-3, atol=1e-3)
    assert written == expected.argmax(-1).tolist()


def test_dense_models_write_what_transformers_has_them_write(tiny_llama: Path) -> None:
    model = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False).eval()
    tokens = random_tokens(1, 9)
    expected = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert continue_greedily(model, tokens[0].tolist(), max_new_tokens=20, ends=()) == expected[0, 9:].tolist()


class Output(dict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Silent:
    """A tokenizer that adds nothing to a text."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode()]}


class Words:
    """A tokenizer of words that ends each text, and whose decoder drops the space that a text begins with."""

    eos_token_id = 0
    known = ("", "a", "cat", "sat", "down")

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*map(self.known.index, text.split()), 0]}

    def decode(self, tokens: list[int], **options: bool) -> str:
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return " ".join(self.known[token] for token in tokens)


class Speaker(nn.Module):
    """Says a text by heart, whatever it is given; then breaks."""

    def __init__(self, words: list[int], vocabulary: int, ends: Any = None, positions: int | None = None) -> None:
        super().__init__()
        self.words, self.vocabulary, self.device = words, vocabulary, torch.device("cpu")
        self.heard: list[list[int]] = []
        self.generation_config = SimpleNamespace(eos_token_id=ends)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=positions))

    def forward(self, input_ids: Tensor, past_key_values: int | None, use_cache: bool) -> Any:
        assert not self.training and use_cache
        self.heard += input_ids.tolist()
        said = past_key_values or 0
        logits = torch.zeros(1, input_ids.shape[1], self.vocabulary)
        if said < len(self.words):
            logits[0, -1, self.words[said]] = 1.0
        else:
            logits[0, -1, 3] = torch.nan
        return Output(logits=logits, past_key_values=said + 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(EMBEDDED)


def said(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that stands behind another."""
    before = tokenizer("A cat")["input_ids"]
    whole = tokenizer(f"A cat{text}")["input_ids"]
    assert whole[: len(before)] == before
    return whole[len(before) :]


def test_a_sample_has_the_text_behind_the_prompt_and_its_measures(tokenizer: Any) -> None:
    words = said(tokenizer, " sat on the mat. The cat sat on the mat. The cat sat on the mat.")
    model = Speaker([*words, tokenizer.eos_token_id], len(tokenizer)).train()
    (sample,) = generate_samples(model, tokenizer, ["A cat"], max_new_tokens=100)
    assert model.training  # left in the mode that it was in
    assert sample.prompt == "A cat"
    assert sample.text == " sat on the mat. The cat sat on the mat. The cat sat on the mat."
    assert sample.distinct == tuple(distinct(words, n) for n in (1, 2, 3, 4))
    assert sample.repetition == repetition(words) > 0.4


def test_the_space_behind_a_prompt_is_kept_and_an_end_that_the_tokenizer_adds_is_not() -> None:
    model = Speaker([3, 4, 0], vocabulary=5)
    (sample,) = generate_samples(model, Words(), ["a cat"], max_new_tokens=9)
    assert sample.text == " sat down"
    assert model.heard == [[1, 2], [3], [4]]


@pytest.mark.parametrize("ends", [9, [8, 9], None])
def test_a_text_ends_where_the_model_or_the_tokenizer_says_so(tokenizer: Any, ends: Any) -> None:
    last = tokenizer.eos_token_id if ends is None else 9
    assert last != 20
    model = Speaker([20, 21, last, 22], len(tokenizer), ends)
    (sample,) = generate_samples(model, tokenizer, ["A cat"], max_new_tokens=4)
    assert sample.distinct == (1.0, 1.0, 0.0, 0.0)  # of two tokens


def test_a_model_that_says_nothing_has_an_empty_text(tokenizer: Any) -> None:
    (sample,) = generate_samples(Speaker([9], len(tokenizer), 9), tokenizer, ["A cat"], max_new_tokens=4)
    assert (sample.text, sample.distinct, sample.repetition) == ("", (0.0,) * 4, 0.0)


def test_logits_that_are_not_finite_are_told(tokenizer: Any) -> None:
    model = Speaker([20, 21], len(tokenizer)).train()
    number = len(tokenizer("A cat")["input_ids"]) + 2
    with pytest.raises(UserError, match=f"logits that are not finite after {number} tokens"):
        generate_samples(model, tokenizer, ["A cat"], max_new_tokens=3)
    assert model.training


def test_what_cannot_be_continued_is_told(tokenizer: Any) -> None:
    length = len(tokenizer("A cat")["input_ids"])
    model = Speaker([20] * 20, len(tokenizer), positions=length + 5)
    assert len(generate_samples(model, tokenizer, ["A cat"], max_new_tokens=5)) == 1
    with pytest.raises(UserError, match=f"'A cat' has {length} tokens; with 6 new .* the {length + 5} positions"):
        generate_samples(model, tokenizer, ["A cat"], max_new_tokens=6)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        generate_samples(model, tokenizer, ["A cat"], max_new_tokens=0)
    with pytest.raises(UserError, match="The prompt '' has no tokens"):
        generate_samples(model, Silent(), [""], max_new_tokens=4)


def test_the_embedded_model_goes_on_with_the_default_prompts(tokenizer: Any) -> None:
    model = load_model(EMBEDDED, dtype="float32", trust_remote_code=False)
    samples = generate_samples(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert [sample.prompt for sample in samples] == list(PROMPTS)
    assert samples == generate_samples(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert samples[0].distinct[0] > 0.3 and samples[0].text.strip()
