from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qpruner.datamodules import tokens
from qpruner.datamodules.rows import Row
from qpruner.datamodules.tokens import bytes_per_token, tokenize, tokenizer_fingerprint
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

TEXTS = [
    "Lily saw a cat.",
    "  Ärger in the café:\n\n\tnaïve 猫 and 👩‍👩‍👧 🏳️‍🌈!  ",
    "",
    "    indented\n        deeper\n",
]


def wrapped(tokenizer: Tokenizer, *, begin: bool = True, end: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that puts <s> before a text, or </s> after it."""
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.Sequence(
        [
            *([tokenizer.post_processor] if tokenizer.post_processor else []),
            processors.TemplateProcessing(
                single="<s> " * begin + "$A" + " </s>" * end,
                special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram(**options: bool) -> PreTrainedTokenizerFast:
    """As sentencepiece makes them: no words, spaces written as ▁, one put before the text, unknown characters."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False, initial_alphabet=[]
    )
    tokenizer.train_from_iterator([STORY], trainer)
    return wrapped(tokenizer, **options)


def falling_back(**options: bool) -> PreTrainedTokenizerFast:
    """As that of Llama 2: ▁ before every word, and bytes for the characters that it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        [STORY], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    return wrapped(tokenizer, **options)


def trimming(**options: bool) -> PreTrainedTokenizerFast:
    """As those of GPT-2 and Pythia: bytes, with the spaces trimmed off the offsets of a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["if x:        return x\n" * 9, STORY], trainer)
    return wrapped(tokenizer, **options)


STORY = " ".join(f"Lily had {n} red apples and Ben, who was {n % 7} years old, gave her one more!\n" for n in range(60))
MAKERS: dict[str, Any] = {
    "embedded": lambda: load_tokenizer(EMBEDDED),
    "unigram": unigram,
    "falling back": falling_back,
    "trimming": trimming,
    "both ends": lambda: trimming(end=True),
}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return MAKERS[request.param]()


def rows(tokenizer: Any, texts: list[str], **options: Any) -> list[Row]:
    return list(tokenize(tokenizer, texts, **({"special_tokens": True} | options)))


@pytest.mark.parametrize("special_tokens", [True, False])
def test_tokens_are_those_of_the_tokenizer(tokenizer: Any, special_tokens: bool) -> None:
    found = rows(tokenizer, TEXTS, special_tokens=special_tokens)
    assert [row.tokens.tolist() for row in found] == [
        tokenizer(text, add_special_tokens=special_tokens)["input_ids"] for text in TEXTS
    ]
    assert all(row.scored.all() and len(row.scored) == len(row.tokens) == len(row.num_bytes) for row in found)
    assert {(row.tokens.dtype, row.scored.dtype, row.num_bytes.dtype) for row in found} == {
        (np.dtype(np.int32), np.dtype(np.bool_), np.dtype(np.int32))
    }


def test_bytes_of_the_tokens_sum_to_the_bytes_of_the_text(tokenizer: Any) -> None:
    for text, row in zip(TEXTS, rows(tokenizer, TEXTS), strict=True):
        assert row.num_bytes.sum() == len(text.encode()), text
        assert (row.num_bytes >= 0).all()
        special = np.isin(row.tokens, tokenizer.all_special_ids) & (row.tokens != tokenizer.unk_token_id)
        assert not row.num_bytes[special].any()


def test_bytes_per_token_by_hand() -> None:
    # <s>, "é", " a" without its space, both tokens of "👋", a token of trimmed spaces, </s>
    offsets = np.array([(0, 0), (0, 1), (2, 3), (3, 4), (3, 4), (6, 6), (0, 0)])
    assert bytes_per_token("é a👋  ", offsets).tolist() == [0, 2, 2, 4, 0, 2, 0]
    assert bytes_per_token("", np.empty((0, 2), int)).tolist() == []


def test_spans_are_scored_and_nothing_else() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    text = "Ben said: Hello 👋 there. Lily said: Bye, Ben."
    spans = [tuple(text.index(said) + n for n in (0, len(said))) for said in (" Hello 👋 there.", " Bye, Ben.")]
    (row,) = rows(tokenizer, [text], scored_from=[spans])
    assert tokenizer.decode(row.tokens[row.scored]) == " Hello 👋 there. Bye, Ben."
    assert not row.scored[0]  # <s>
    assert not rows(tokenizer, [text], scored_from=[[]])[0].scored.any()
    assert [row.scored.any() for row in rows(tokenizer, [text, text], scored_from=[[], None])] == [False, True]
    assert rows(tokenizer, [text], scored_from=[None])[0].scored.all()


def test_a_token_across_the_border_belongs_to_the_response() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    text = "Ben saw the cat"  # tokens: <s> B en Ġsaw Ġthe ...
    for first in range(text.index(" the"), text.index("the") + 3):
        (row,) = rows(tokenizer, [text], scored_from=[[(first, len(text))]])
        assert tokenizer.decode(row.tokens[row.scored]) == " the cat", first
    (row,) = rows(tokenizer, [text], scored_from=[[(0, text.index("the") + 2)]])
    assert tokenizer.decode(row.tokens[row.scored]) == "Ben saw"


def test_spaces_of_which_trimmed_offsets_leave_nothing_are_scored() -> None:
    tokenizer = trimming()
    prompt, response = "Code:\n", "if x:        return x\n"
    text = prompt + response
    spans = [[(len(prompt), len(text))]]
    assert any(first == last > 0 for first, last in tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    (row,) = rows(tokenizer, [text], scored_from=spans)
    assert tokenizer.decode(row.tokens[row.scored]) == response


def test_a_slow_tokenizer_gives_tokens_without_bytes() -> None:
    tokenizer = ByT5Tokenizer()  # a token a byte, 3 above it, and </s> = 1
    (row,) = rows(tokenizer, ["hé"])
    assert row.tokens.tolist() == [ord("h") + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert row.num_bytes.tolist() == [0, 0, 0, 0]
    assert row.scored.all()
    with pytest.raises(UserError, match=r"ByT5Tokenizer does not say where.*fast tokenizer.*response_only false"):
        rows(tokenizer, ["hé"], scored_from=[[(0, 1)]])


@pytest.mark.parametrize("batch", [1, 300, 10**6])
def test_batching_changes_nothing(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    monkeypatch.setattr(tokens, "BATCH", batch)
    assert [row.tokens.tolist() for row in rows(tokenizer, TEXTS * 3)] == [tokenizer(t)["input_ids"] for t in TEXTS * 3]


@pytest.mark.parametrize("window", [700, 701, 997])
def test_a_long_text_in_pieces_equals_the_whole(
    tokenizer: Any, window: int, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    text = f"{TEXTS[1]}{STORY}{TEXTS[1]}"
    spans = [(100, 1500), (2000, 2100), (2500, len(text))]
    long, short = f"{text}", "Ben."
    expected = rows(tokenizer, [short, long, long, short], scored_from=[[(0, 3)], spans, [], []])
    assert encoded[-4:] == [len(short), len(text), len(text), len(short)]
    monkeypatch.setattr(tokens, "WINDOW", window)
    monkeypatch.setattr(tokens, "OVERLAP", 500)
    encoded.clear()
    found = rows(tokenizer, [short, long, long, short], scored_from=[[(0, 3)], spans, [], []])
    assert max(encoded) == window + 500 < len(text)
    for mine, whole in zip(found, expected, strict=True):
        assert mine.tokens.tolist() == whole.tokens.tolist()
        assert mine.scored.tolist() == whole.scored.tolist()
        assert mine.num_bytes.tolist() == whole.num_bytes.tolist()


def test_a_text_longer_than_the_window_as_it_is(encoded: list[int]) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    text = " ".join(f"{n}: {TEXTS[1]} {TEXTS[3]}{STORY[n % 50 :]}" for n in range(50))
    (row,) = rows(tokenizer, [text])
    assert encoded == [105_000, 105_000, len(text) - 200_000]
    assert row.tokens.tolist() == tokenizer(text)["input_ids"]
    assert row.num_bytes.sum() == len(text.encode()) > len(text)


def test_a_text_whose_pieces_do_not_agree_is_tokenized_whole(
    monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    # Three spaces make a token, so where a piece of nothing but spaces begins decides on all its tokens.
    tokenizer = trimming()
    text = " " * 3000
    expected = tokenizer(text)["input_ids"]
    monkeypatch.setattr(tokens, "WINDOW", 701)
    monkeypatch.setattr(tokens, "OVERLAP", 500)
    (row,) = rows(tokenizer, [text])
    assert row.tokens.tolist() == expected
    assert encoded[-1] == len(text)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that a tokenizer was given."""
    lengths: list[int] = []
    batches = tokens.in_batches

    def spy(texts: Any) -> Any:
        for batch in batches(texts):
            lengths.extend(map(len, batch))
            yield batch

    monkeypatch.setattr(tokens, "in_batches", spy)
    return lengths


def test_fingerprint_tells_tokenizers_apart() -> None:
    base = tokenizer_fingerprint(load_tokenizer(EMBEDDED))
    assert tokenizer_fingerprint(load_tokenizer(EMBEDDED)) == base
    chatty, ended = load_tokenizer(EMBEDDED), load_tokenizer(EMBEDDED)
    chatty.chat_template = "{{ messages[0]['content'] }}"
    ended.eos_token = "<pad>"
    prints = [base, *map(tokenizer_fingerprint, (chatty, ended, unigram(), unigram(end=True), ByT5Tokenizer()))]
    assert len(set(prints)) == len(prints)


def test_fingerprint_outlives_a_call() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    base = tokenizer_fingerprint(tokenizer)
    tokenizer(["some text", "more"], truncation=True, max_length=3, padding=True)
    assert tokenizer_fingerprint(tokenizer) == base
