"""How far an export is from its model."""

from pathlib import Path

import pytest
import torch
from support.exports import source_of
from support.families import random_tokens

from qpruner.export.fidelity import SENTENCES, logit_errors, sentences
from qpruner.pretrained import EMBEDDED, load_tokenizer


def test_errors_are_those_of_the_logits(tmp_path: Path) -> None:
    """A head twice as large doubles the logits, and changes no choice."""
    source = source_of(tmp_path / "m")

    def read(name: str) -> torch.Tensor:
        return source.weight(name) * (2 if name == "lm_head.weight" else 1)

    expected = source.network(random_tokens()).logits
    errors = logit_errors(source, read, random_tokens())
    assert errors.largest == pytest.approx(expected.abs().max().item(), rel=1e-5)
    assert errors.mean == pytest.approx(expected.abs().mean().item(), rel=1e-5)
    assert errors.spread == pytest.approx(expected.std().item(), rel=1e-5)
    assert errors.agreement == 1 and errors.num_tokens == 24


def test_the_model_itself_has_none(tmp_path: Path) -> None:
    source = source_of(tmp_path / "m", tie_word_embeddings=True)
    errors = logit_errors(source, source.weight, random_tokens())
    assert (errors.largest, errors.mean, errors.agreement) == (0, 0, 1)


def test_sentences_are_a_few_hundred_tokens() -> None:
    tokens = sentences(load_tokenizer(EMBEDDED))
    assert len(tokens) == len(SENTENCES) and 100 < tokens.numel() < 500
