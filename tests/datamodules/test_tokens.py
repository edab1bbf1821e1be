from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qpruner.datamodules import tokens
from qpruner.datamodules.tokens import bytes_per_token, tokenize, tokenizer_fingerprint
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

TEXTS = ["One day Tom left.", "naïve café — 東京 🙂🙂 end", "", " leading  and   inner spaces ", "a\nb\n\n\tc"]


@pytest.fixture(scope="module")
def byte_level() -> Any:
    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="module")
def metaspace() -> Any:
    """A tokenizer in the manner of SentencePiece: it puts a space before the text and falls back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(TEXTS[:1] * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


def test_tokens_are_the_tokenizers_own(byte_level: Any) -> None:
    for special in (True, False):
        rows = list(tokenize(byte_level, TEXTS, special_tokens=special))
        expected = [byte_level(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
        assert [row.tokens.tolist() for row in rows] == expected
        assert all(row.scored.all() for row in rows)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_every_byte_of_a_text_is_counted_once(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    for text, row in zip(TEXTS, tokenize(tokenizer, TEXTS, special_tokens=False), strict=True):
        trailing = len(text) - len(text.rstrip()) if kind == "metaspace" else 0
        assert len(text.encode()) - trailing <= row.num_bytes.sum() <= len(text.encode())
        assert (row.num_bytes >= 0).all()


def test_bytes_by_hand() -> None:
    # <s>, "é" (2 bytes), " a" of which the offsets leave the space out, two halves of one emoji (4 bytes), </s>
    offsets = np.array([[0, 0], [0, 1], [2, 3], [3, 4], [3, 4], [0, 0]])
    assert bytes_per_token("é a🙂", offsets).tolist() == [0, 2, 2, 4, 0, 0]
    assert bytes_per_token("", np.empty((0, 2), dtype=np.int64)).tolist() == []


def test_only_the_given_spans_are_scored(byte_level: Any) -> None:
    text = "ask: What? say: A red ball. ask: And? say: Tom."
    first, second = text.index("A red"), text.index("Tom")
    (row,) = tokenize(byte_level, [text], special_tokens=True, scored_from=[[(first, first + 11), (second, len(text))]])
    assert byte_level.decode(row.tokens[row.scored]).split() == ["A", "red", "ball.", "Tom."]


def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"Story {n}: Tom had {n} naïve cats 🙂 and, well, {n * n} dogs." for n in range(3000))
    assert len(text) > 120_000
    whole = byte_level(text)["input_ids"]
    spans = [(500, 900), (100_000, 100_300)]
    encoded = []
    original = tokens._encode
    monkeypatch.setattr(tokens, "_encode", lambda *a: encoded.append(a) or original(*a))
    (row,) = tokenize(byte_level, [text], special_tokens=True, scored_from=[spans])
    assert len(encoded) == 1  # the pieces agreed
    assert row.tokens.tolist() == whole
    assert row.num_bytes.sum() == len(text.encode())
    monkeypatch.setattr(tokens, "WINDOW", 10**9)
    (at_once,) = tokenize(byte_level, [text], special_tokens=True, scored_from=[spans])
    assert np.array_equal(row.scored, at_once.scored)
    assert np.array_equal(row.num_bytes, at_once.num_bytes)


def test_pieces_that_never_agree_fall_back_to_the_whole(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "WINDOW", 100)
    monkeypatch.setattr(tokens, "OVERLAP", 10)  # too few tokens for an agreement
    text = "One day Tom went to the valley and heard something cry. " * 10
    (row,) = tokenize(byte_level, [text], special_tokens=True)
    assert row.tokens.tolist() == byte_level(text)["input_ids"]


def test_many_texts_cross_batches(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BATCH", 150)
    rows = list(tokenize(byte_level, TEXTS * 3, special_tokens=False))
    assert [row.tokens.tolist() for row in rows] == [
        byte_level(t, add_special_tokens=False)["input_ids"] for t in TEXTS
    ] * 3


class Slow:
    """As much of a slow tokenizer as is asked of it: no offsets."""

    is_fast = False

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def test_a_slow_tokenizer_gives_tokens_without_bytes_and_cannot_score_parts() -> None:
    (row,) = tokenize(Slow(), ["abc"], special_tokens=False)
    assert row.tokens.tolist() == [97, 98, 99]
    assert row.num_bytes.tolist() == [0, 0, 0]
    with pytest.raises(UserError, match="Slow does not say where.*response_only false"):
        list(tokenize(Slow(), ["abc"], special_tokens=False, scored_from=[[(0, 1)]]))


def test_fingerprint_knows_tokenizers_apart_and_not_their_state(byte_level: Any, metaspace: Any) -> None:
    before = tokenizer_fingerprint(byte_level)
    byte_level(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(byte_level) == before
    assert tokenizer_fingerprint(metaspace) != before
    other = load_tokenizer(EMBEDDED)
    other.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(other) != before
