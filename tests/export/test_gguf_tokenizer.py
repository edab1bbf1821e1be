"""Tokenizers as llama.cpp builds them."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.exports import source_of
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qpruner.errors import UserError
from qpruner.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPLITS, UNKNOWN, UNUSED, USER_DEFINED
from qpruner.export.gguf_tokenizer import describe_tokenizer as described
from qpruner.pretrained import EMBEDDED, load_tokenizer

TEXTS = [
    "Once upon a time there was a fox.",
    "  two spaces, and  two more ",
    "one line\n\nanother\n\tand a tab",
    "déjà vu, naïve Zürich, smörgåsbord",
    "🙂🚀 and 日本語",
    "we'll DON'T 1234567 x=3.14!",
]
CORPUS = [
    *TEXTS,
    "there was a time upon which the naïve fox was 12345678 lines away",
    "and another line, and a time",
] * 3


def byte_level(*steps: Any, normalizer: Any = None, **model: Any) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE that splits text by some steps."""
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def characters(*, prepend: bool) -> PreTrainedTokenizerFast:
    """BPE over characters with a byte for what is unknown, its merges as SentencePiece's are."""
    words = sorted({f"▁{word}" for text in CORPUS for word in text.split()})
    letters = sorted({letter for word in words for letter in word if letter.isascii() or letter == "▁"})
    pieces = [
        "▁t",
        "▁a",
        "he",
        "the",
        "▁the",
        "re",
        "an",
        "▁an",
        "▁and",
        "in",
        "ine",
        "▁l",
        "▁line",
        "me",
        "ime",
        "▁time",
    ]
    vocab = {text: n for n, text in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))])}
    for text in [*pieces, *letters]:
        vocab[text] = len(vocab)
    merges = [
        (piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]  # fmt: skip
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA3, DBRX, QWEN2 = (
    [key[0][0] for key, name in SPLITS.items() if name == n][0] for n in ("llama-bpe", "dbrx", "qwen2")
)
BYTES, BARE = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel(False, use_regex=False)


def isolated(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KNOWN = {
    "gpt-2": lambda: byte_level(BYTES),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), BYTES),
    "llama-bpe": lambda: byte_level(isolated(LLAMA3), BARE, ignore_merges=True),
    "dbrx": lambda: byte_level(isolated(DBRX), BARE),
    "qwen2": lambda: byte_level(isolated(QWEN2), BARE, normalizer=normalizers.NFC()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_ways_to_split_text_have_their_names(name: str) -> None:
    tokenizer = KNOWN[name]()
    file = described(tokenizer, len(tokenizer))
    assert (file.model, file.split) == ("gpt2", name)
    assert file.tokens == [tokenizer.convert_ids_to_tokens(n) for n in range(len(tokenizer))]
    assert file.types == [CONTROL, CONTROL, *[NORMAL] * (len(tokenizer) - 2)]
    assert all(left + right in file.tokens for left, right in (merge.split(" ") for merge in file.merges))
    assert file.special == {"bos_token_id": 0, "eos_token_id": 1}
    assert file.flags == {"add_bos_token": False, "add_eos_token": False}


def test_rows_without_a_token_and_tokens_without_a_row() -> None:
    tokenizer = byte_level(BYTES)
    tokenizer.add_tokens(["<<word>>"])
    number = len(tokenizer)
    file = described(tokenizer, number + 2)
    assert file.tokens[-3:] == ["<<word>>", f"[PAD{number}]", f"[PAD{number + 1}]"]
    assert file.types[-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert len(described(tokenizer, number - 1).tokens) == number - 1


def test_the_embedded_tokenizer_begins_with_a_token() -> None:
    file = described(load_tokenizer(EMBEDDED), 2048)
    assert file.split == "gpt-2" and file.flags == {"add_bos_token": True, "add_eos_token": False}
    assert file.special == {"bos_token_id": 0, "eos_token_id": 1, "padding_token_id": 2}


def test_scores_keep_the_order_of_merges() -> None:
    file = described(characters(prepend=True), 400)
    assert (file.model, file.split, file.merges) == ("llama", None, [])
    assert file.flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert file.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    score = dict(zip(file.tokens, file.scores, strict=True))
    assert score["▁t"] == 0 > score["▁a"] == -1 > score["he"] > score["▁the"] > score["re"] > score["x"]
    assert described(characters(prepend=False), 400).flags["add_space_prefix"] is False


def test_merges_in_no_order_of_tokens_are_refused() -> None:
    tokenizer = characters(prepend=True)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = content["model"]["merges"]
    of_the = [place for place, (left, right) in enumerate(merges) if left + right == "▁the"]
    merges.insert(0, merges.pop(of_the[-1]))  # the other stays behind merges of other tokens
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>")
    assert len(of_the) == 2
    with pytest.raises(UserError, match="merges are in an order that no score of tokens gives"):
        described(other, 400)


def test_chat_templates_go_along() -> None:
    tokenizer = byte_level(BYTES)
    assert described(tokenizer, 300).chat_template is None
    tokenizer.chat_template = "{{ messages }}"
    assert described(tokenizer, 300).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: byte_level(isolated(r"\p{L}+"), BARE), "a way whose name in llama.cpp is not known"),
        (lambda: byte_level(isolated(QWEN2), BARE, ignore_merges=True), "a way whose name in llama.cpp is not known"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "does not split text by ByteLevel"),
        (lambda: byte_level(BYTES, normalizer=normalizers.Lowercase()), "alters text .Lowercase."),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)]))),
            "it is of type Unigram",
        ),
        (lambda: object(), "written in Python"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused(tokenizer: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"cannot write the tokenizer: .*{said}.*--tokenizer false"):
        described(tokenizer(), 300)


@pytest.mark.parametrize("name", [*KNOWN, "llama", "llama without a space", "embedded"])
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, name: str) -> None:
    pytest.importorskip("llama_cpp")
    import torch
    from support.engines import ask_llama_cpp

    from qpruner.export.gguf_file import Gguf

    if name == "embedded":
        tokenizer = load_tokenizer(EMBEDDED)
    else:
        tokenizer = KNOWN[name]() if name in KNOWN else characters(prepend=name == "llama")
    source = source_of(tmp_path / "m", tokenizer=tokenizer, vocab_size=len(tokenizer))
    Gguf().write(source, tmp_path / "out", torch.float16)
    texts = TEXTS
    answer = ask_llama_cpp(tmp_path, model=tmp_path / "out" / "model.gguf", texts=texts)
    assert answer["tokenized"] == [tokenizer(text)["input_ids"] for text in texts]
    assert [text.removeprefix(" " if name == "llama" else "") for text in answer["detokenized"]] == texts
