"""A Hugging Face tokenizer as the metadata from which llama.cpp builds its own.

llama.cpp identifies tokenizers by name. Byte-level BPE is ``gpt2``, with the name of its pre-tokenizer, which splits
text into words; `SPLITS` lists the names of those that llama.cpp implements identically. Character-level BPE with byte
fallback, as in SentencePiece, is ``llama``, which merges the two neighbours whose union has the highest score: the
scores here rank unions in the order of the tokenizer's own merges.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qpruner.errors import UserError

WITHOUT = "Export with --tokenizer false, for prompts of token ids, or use --format dense"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, as llama.cpp numbers them."""

GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_SYMBOLS = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
SPLITS = {
    ((GPT2,), False): "gpt-2",
    (("digits", GPT2), False): "smollm",
    ((f"{_CASELESS}\\p{{N}}{{1,3}}{_SYMBOLS}",), True): "llama-bpe",
    ((f"{_CASELESS}\\p{{N}}{{1,3}}{_SYMBOLS}",), False): "dbrx",
    ((f"{_CASELESS}\\p{{N}}{_SYMBOLS}",), False): "qwen2",
}
"""Names by the patterns that split a text into words, and by whether a word that is a token is kept whole."""


@dataclass(frozen=True)
class TokenizerFile:
    """Metadata of a tokenizer in a file.

    Args:
        model: kind of tokenizer, as llama.cpp names it.
        split: name of the pre-tokenizer, which splits text into words; None for ``llama``.
        tokens: text of each token, as many as the embedding has rows.
        types: kind of each token.
        scores: score of each token, of ``llama`` alone; empty elsewhere.
        merges: pairs of tokens that become one, each with a space between, of ``gpt2`` alone; empty elsewhere.
        special: ids of special tokens by their name in metadata, such as ``bos_token_id``.
        flags: whether special tokens are added to a text, such as ``add_bos_token``.
        chat_template: chat template, or several by name; None without one.
    """

    model: str
    split: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | dict[str, str] | None


def describe_tokenizer(tokenizer: Any, vocabulary: int) -> TokenizerFile:
    """Metadata of a tokenizer in a file.

    Args:
        tokenizer: tokenizer of transformers.
        vocabulary: number of rows of the model's embedding.

    Raises:
        UserError: llama.cpp has no such tokenizer, or none that this module knows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal("it is written in Python, and llama.cpp cannot run that")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise _refusal(f"it is of type {model['type']}; only BPE is written so far")
    added = {token["id"]: token for token in content["added_tokens"]}
    by_id = {number: text for text, number in model["vocab"].items()}
    by_bytes = model.get("byte_fallback", False)
    tokens, types = [], []
    for number in range(vocabulary):
        if number in added:
            text = added[number]["content"]
            kind = CONTROL if added[number]["special"] else USER_DEFINED
            if by_bytes and text == model.get("unk_token"):
                kind = UNKNOWN
            if by_bytes and kind == USER_DEFINED:
                text = text.replace("▁", " ")  # llama.cpp finds it in the text as it is given
        else:
            text = by_id.get(number, f"[PAD{number}]")
            kind = UNUSED if number not in by_id else BYTE if by_bytes and _is_byte(text) else NORMAL
        tokens.append(text)
        types.append(kind)
    if len(set(tokens)) < len(tokens):
        raise _refusal("two of its tokens have one text")
    flags = _added_ends(tokenizer)
    if by_bytes:
        flags["add_space_prefix"] = _prepends_space(content)
        return TokenizerFile(
            "llama",
            None,
            tokens,
            types,
            _scores(model, tokens, types),
            [],
            _special(tokenizer, vocabulary),
            flags,
            tokenizer.chat_template,
        )
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    return TokenizerFile(
        "gpt2",
        _split_name(content),
        tokens,
        types,
        [],
        merges,
        _special(tokenizer, vocabulary),
        flags,
        tokenizer.chat_template,
    )


def _split_name(content: dict[str, Any]) -> str:
    """The name of the pre-tokenizer of a byte-level BPE."""
    kinds = {step["type"] for step in _steps(content["normalizer"], "normalizers")}
    if kinds - {"NFC"}:  # which leaves all but decomposed letters as they are; llama.cpp has none
        raise _refusal(f"it alters text ({', '.join(sorted(kinds))}) before it is split")
    patterns = []
    for step in _steps(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Digits" and step["individual_digits"]:
            patterns.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [GPT2] if step["use_regex"] else []
        else:
            raise _refusal(f"llama.cpp does not split text by {step['type']} as it does")
    key = tuple(patterns), bool(content["model"].get("ignore_merges"))
    if key not in SPLITS:
        raise _refusal("it splits text into words in a way whose name in llama.cpp is not known here")
    return SPLITS[key]


def _prepends_space(content: dict[str, Any]) -> bool:
    """Whether a character-level BPE, which writes spaces as ``▁``, prepends a space to a text."""
    steps = [*_steps(content["normalizer"], "normalizers"), *_steps(content["pre_tokenizer"], "pretokenizers")]
    prepends = replaces = False
    for step in steps:
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prepends = True
        elif step["type"] == "Metaspace" and step["replacement"] == "▁" and not step["split"]:
            replaces, prepends = True, step["prepend_scheme"] != "never"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaces = True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "}):  # of which none are left
            raise _refusal(f"llama.cpp does not alter text by {step['type']} as it does")
    if not replaces:
        raise _refusal("it has no sign for spaces")
    return prepends


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """A score for each token, higher the earlier a merge produces it.

    Raises:
        UserError: the merges that produce one token are interleaved with those of another. This does not matter for
            tokens that are found in the text before any merge.
    """
    places: dict[str, list[int]] = {}
    for place, pair in enumerate(model["merges"]):
        first, second = pair if isinstance(pair, list) else pair.split(" ")
        places.setdefault(first + second, []).append(place)
    merged = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    if any(spots[-1] - spots[0] != len(spots) - 1 for token, spots in places.items() if token in merged):
        raise _refusal("its merges are in an order that no score of tokens gives")
    last = len(model["merges"])
    return [-float(places[token][0] if token in places else last) for token in tokens]


def _special(tokenizer: Any, vocabulary: int) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{ours}_token_id") for ours, name in names.items()}
    return {name: number for name, number in ids.items() if number is not None and number < vocabulary}


def _added_ends(tokenizer: Any) -> dict[str, bool]:
    """Whether the tokenizer adds a token at the beginning and at the end of a text."""
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "add_bos_token": bos is not None and ids[0] == bos,
        "add_eos_token": eos is not None and len(ids) > 1 and ids[-1] == eos,
    }


def _steps(part: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    if part is not None:
        yield from part[name] if part["type"] == "Sequence" else [part]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _refusal(reason: str) -> UserError:
    return UserError(f"--format gguf cannot write the tokenizer: {reason}. {WITHOUT}.")
