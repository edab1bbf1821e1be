"""Tokenizes contexts and their continuations, to score the latter, exactly as lm-evaluation-harness does.

The whole text is tokenized, and cut after as many tokens as the context has alone. So an option has the tokens that it
has after its context; if a token crosses the border, the context keeps the tokens that it has alone, and the option
gets the rest of the whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from qpruner.datamodules.tokens import in_batches
from qpruner.errors import UserError, brief


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """The tokens of each context and of its continuation, at least one each; every distinct text is tokenized once.

    Spaces at the end of a context are moved to its continuation. The tokenizer adds the special tokens that it usually
    adds, unless a text already begins with the first of them. An empty context becomes the token that begins a text, or
    the one that ends a text if the tokenizer has no other.

    Args:
        tokenizer: tokenizer of transformers, fast or slow.
        pairs: contexts and continuations.

    Raises:
        UserError: no token of a whole text is left for its continuation, or a context is empty and the tokenizer has
            neither of these two special tokens.
    """
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    beginning = None if prefix is None else tokenizer.decode(prefix)

    def as_asked(text: str) -> tuple[str, bool]:
        """The text, and whether the tokenizer is to add special tokens."""
        return text, beginning is None or not text.startswith(beginning)

    split = [_without_spaces_at_the_border(*pair) for pair in pairs]
    texts = {as_asked(text) for context, rest in split if context for text in (context, context + rest)}
    texts |= {(rest, False) for context, rest in split if not context}
    tokens = {
        (text, special_tokens): ids
        for special_tokens in (True, False)
        for text, ids in _tokens(tokenizer, sorted(t for t, s in texts if s == special_tokens), special_tokens)
    }
    encoded = []
    for context, rest in split:
        if context:
            before, whole = tokens[as_asked(context)], tokens[as_asked(context + rest)]
            behind = whole[len(before) :]
        else:
            if prefix is None:
                raise UserError(
                    f"The context of {brief(rest)} is empty, and {type(tokenizer).__name__} has no token that begins "
                    f"or ends a text. Set its bos_token, or leave the question out."
                )
            whole = tokens[rest, False]
            before, behind = ([prefix], whole) if whole[:1] != [prefix] else (whole[:1], whole[1:])
        if not before or not behind:
            raise UserError(
                f"The tokenizer has no token of its own for {brief(rest)} behind {brief(context)}. "
                f"Leave the question out."
            )
        encoded.append((before, behind))
    return encoded


def fit_length(context: list[int], continuation: list[int], length: int) -> tuple[list[int], list[int], int]:
    """Context and continuation, truncated from the left so that a model can score them, and the number of tokens cut.

    The last token is scored but is no input, so one token more than the model takes as input remains.

    Args:
        context: tokens before the continuation.
        continuation: tokens to score, which are never cut.
        length: number of tokens that the model can take as input at once.

    Raises:
        UserError: the continuation alone is longer.
    """
    if len(continuation) > length:
        raise UserError(
            f"An option has {len(continuation):,} tokens, and the model can be given {length:,}. "
            f"Leave the question out."
        )
    cut = max(len(context) + len(continuation) - (length + 1), 0)
    return context[cut:], continuation, cut


def _without_spaces_at_the_border(context: str, continuation: str) -> tuple[str, str]:
    """Moves the space at the end of the context to the start of the continuation, as tokenizers expect it."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _tokens(tokenizer: Any, texts: Iterable[str], special_tokens: bool) -> Iterator[tuple[str, list[int]]]:
    for batch in in_batches(texts):
        encoded = tokenizer(batch, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        yield from zip(batch, map(list, encoded["input_ids"]), strict=True)
