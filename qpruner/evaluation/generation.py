"""Samples from a model, and how repetitive they are: a model can pass multiple choice and still fail to write.

Pruned models that keep their accuracy on multiple-choice questions may generate nothing but loops (arXiv 2606.17609).
"""

from collections.abc import Collection, Sequence
from inspect import signature
from typing import Any

import torch

from qpruner.errors import UserError, cut
from qpruner.likelihood import causal_model
from qpruner.modes import evaluating
from qpruner.records.evaluation import Sample

PROMPTS = (
    "Once upon a time, there was a",
    "The weather today is",
    "To make a cup of tea, you first",
    "The most important thing about friendship is",
)
"""Prompts that suit any model, whatever it was trained on."""

LONGEST_NGRAM = 4


def generate_samples(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int) -> list[Sample]:
    """Continues some prompts by greedy decoding, so that the same model always writes the same.

    The prompts are processed one by one, without padding, under which not every model is exact. Sampling and penalty
    settings of the model's own generation config are ignored, because loops are to be detected, not suppressed.

    Args:
        model: causal language model, perhaps compressed or with adapters; it is left in its original mode.
        tokenizer: tokenizer of the model.
        prompts: texts to continue.
        max_new_tokens: maximum number of tokens to generate after each prompt, at least 1; an end-of-text token ends a
            text sooner.

    Raises:
        UserError: a prompt has no tokens, there are more tokens than the model has positions, or logits are not finite.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; give at least 1.")
    with evaluating(model):
        return [_sample(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]


def distinct(tokens: Sequence[int], n: int) -> float:
    """Share of distinct n-grams among all n-grams of the tokens (distinct-n, Li et al., arXiv 1510.03055).

    0 where there are too few tokens for an n-gram: an empty text contains nothing new.
    """
    ngrams = _ngrams(tokens, n)
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repetition(tokens: Sequence[int], n: int = LONGEST_NGRAM) -> float:
    """Share of tokens that lie in an n-gram which occurred before; its first occurrence does not count."""
    seen: set[tuple[int, ...]] = set()
    repeated: set[int] = set()
    for start, ngram in enumerate(_ngrams(tokens, n)):
        if ngram in seen:
            repeated.update(range(start, start + n))
        seen.add(ngram)
    return len(repeated) / len(tokens) if tokens else 0.0


@torch.inference_mode()
def continue_greedily(model: Any, tokens: Sequence[int], *, max_new_tokens: int, ends: Collection[int]) -> list[int]:
    """Generates tokens by greedy decoding; of equally likely tokens the first is taken.

    Args:
        model: causal language model in evaluation mode.
        tokens: token ids of the prompt.
        max_new_tokens: maximum number of tokens to generate.
        ends: ids of the tokens that end a text; they are not part of the result.

    Raises:
        UserError: the logits are not finite.
    """
    # Newer versions of transformers call it cache; older ones, and code that comes with a model, past_key_values.
    name = "cache" if "cache" in signature(causal_model(model).forward).parameters else "past_key_values"
    written: list[int] = []
    cache: Any = None
    step = torch.tensor([list(tokens)], device=model.device)
    while len(written) < max_new_tokens:
        output = model(input_ids=step, use_cache=True, **{name: cache})
        logits = output.logits[0, -1]
        if not logits.isfinite().all():
            raise UserError(
                f"The model gives logits that are not finite after {len(tokens) + len(written)} tokens, so that it can "
                f"write nothing. Its weights are damaged or its computation overflows: use --dtype float32, "
                f"or an undamaged model."
            )
        step, cache = logits.argmax().view(1, 1), output[name]
        if int(step) in ends:
            break
        written.append(int(step))
    return written


def prompt_tokens(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> list[int]:
    """The tokens of a prompt that a model is to continue.

    Raises:
        UserError: there are none, or together with the new ones they exceed the model's positions.
    """
    tokens = unended(tokenizer(prompt)["input_ids"], model, tokenizer)
    if not tokens:
        raise UserError(f"The prompt {prompt!r} has no tokens. Give one with at least a word.")
    check_positions(model, prompt, len(tokens), max_new_tokens)
    return tokens


def check_positions(model: Any, prompt: str, num_tokens: int, max_new_tokens: int) -> None:
    """Makes sure that a model has enough positions for a prompt and the tokens to generate.

    Raises:
        UserError: it has too few.
    """
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known is not None and num_tokens + max_new_tokens > known:
        raise UserError(
            f"The prompt {cut(repr(prompt), 60)} has {num_tokens:,} tokens; with {max_new_tokens:,} new ones these "
            f"are more than the {known:,} positions that the model knows. Give a shorter one, or ask for fewer tokens."
        )


def _sample(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> Sample:
    tokens, ends = prompt_tokens(model, tokenizer, prompt, max_new_tokens), _ends(model, tokenizer)
    written = continue_greedily(model, tokens, max_new_tokens=max_new_tokens, ends=ends)
    return Sample(
        prompt=prompt,
        text=_text(tokenizer, tokens, written),
        distinct=tuple(distinct(written, n) for n in range(1, LONGEST_NGRAM + 1)),
        repetition=repetition(written),
    )


def unended(tokens: list[int], model: Any, tokenizer: Any) -> list[int]:
    """The tokens of a text without the end-of-text token that some tokenizers append."""
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] in _ends(model, tokenizer) else tokens


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Ids of tokens that end a text: that of the tokenizer, and those of the model's generation config."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return {token for token in ends if token is not None}


def _text(tokenizer: Any, tokens: list[int], written: list[int]) -> str:
    """The new tokens as text; decoded together with the prompt, since many tokenizers drop a leading space."""
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (tokens, tokens + written)
    )
    return whole.removeprefix(before)


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))
