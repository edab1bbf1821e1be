from typing import Any

import pytest
from support.choice_records import RECORDS
from tokenizers import Tokenizer, models, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from qpruner.datamodules import tokens
from qpruner.datamodules.encoding import encode_pairs, fit_length
from qpruner.datamodules.questions import TASKS
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED, load_tokenizer

A, B, C, SPACE, BC, BEGIN, END = range(7)


def letters(*, begin: bool = True, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of three letters and the space, which merges b and c, and puts <s> before a text."""
    vocabulary = {"a": A, "b": B, "c": C, " ": SPACE, "bc": BC, "<s>": BEGIN, "</s>": END}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def questions_as_pairs() -> list[tuple[str, str]]:
    questions = [TASKS[name].question(record) for name, records in RECORDS.items() for record in records]
    return [pair for q in questions for pair in zip(q.contexts, q.continuations, strict=True)]


@pytest.mark.parametrize("tokenizer", [load_tokenizer(EMBEDDED), ByT5Tokenizer()], ids=["fast", "slow, ending texts"])
def test_many_at_once_are_the_same_as_each_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = questions_as_pairs()
    expected = []
    for context, continuation in pairs:
        whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context.rstrip())
        expected.append((before, whole[len(before) :]))
    assert len(set(map(str, expected))) == len(expected) == 66
    assert encode_pairs(tokenizer, pairs) == expected
    monkeypatch.setattr(tokens, "BATCH", 300)  # in several batches
    assert encode_pairs(tokenizer, pairs) == expected
    assert [encode_pairs(tokenizer, [pair])[0] for pair in pairs[:5]] == expected[:5]
    assert encode_pairs(tokenizer, []) == []


def test_spaces_at_the_end_of_a_context_go_to_its_continuation() -> None:
    assert encode_pairs(letters(**SPECIAL), [("a  ", " c")]) == [([BEGIN, A], [SPACE, SPACE, SPACE, C])]


def test_a_token_across_the_border_is_cut_where_the_context_alone_would_end() -> None:
    # The whole is a, bc; the context alone a, b.
    assert encode_pairs(letters(**SPECIAL), [("ab", "ca")]) == [([BEGIN, A, B], [A])]
    with pytest.raises(UserError, match="no token of its own for 'c' behind 'ab'"):
        encode_pairs(letters(**SPECIAL), [("ab", "c")])


def test_a_text_that_begins_as_the_tokenizer_would_begin_it_gets_nothing_more() -> None:
    pairs = [("<s>a", "b"), ("a", "b")]
    assert encode_pairs(letters(**SPECIAL), pairs) == [([BEGIN, A], [B])] * 2


def test_an_empty_context_is_the_beginning_or_end_of_a_text() -> None:
    assert encode_pairs(letters(**SPECIAL), [("", "ab")]) == [([BEGIN], [A, B])]
    assert encode_pairs(letters(**SPECIAL), [("", "<s>ab")]) == [([BEGIN], [A, B])]
    assert encode_pairs(letters(**SPECIAL), [(" ", "a")]) == [([BEGIN], [SPACE, A])]
    assert encode_pairs(letters(begin=False, eos_token="</s>"), [("", "ab")]) == [([END], [A, B])]
    with pytest.raises(UserError, match="context of 'ab' is empty.*Set its bos_token"):
        encode_pairs(letters(begin=False), [("", "ab")])
    assert encode_pairs(letters(begin=False), [("a", "b")]) == [([A], [B])]


def test_what_is_too_long_is_cut_from_the_left_to_a_token_more_than_the_model_is_given() -> None:
    assert fit_length([1, 2, 3], [4, 5], 4) == ([1, 2, 3], [4, 5], 0)
    assert fit_length([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5], 1)
    assert fit_length([1, 2, 3], [4, 5], 2) == ([3], [4, 5], 2)
    with pytest.raises(UserError, match="has 2 tokens, and the model can be given 1"):
        fit_length([1, 2, 3], [4, 5], 1)
