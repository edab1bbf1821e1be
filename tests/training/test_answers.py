"""What a model says of options, as trees and apart, against the plain way of every text on its own."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from qpruner.datamodules.choices import ChoiceBatch, ChoiceExamples
from qpruner.datamodules.rows import FILLER, Row, TokenRows
from qpruner.training.answers import answers, option_log_likelihoods, tree_limit, tree_states
from tests.support.families import EXPLICIT, FAMILIES, tiny_model


def questions(seed: int = 0, number: int = 6) -> ChoiceExamples:
    """Questions of two to four options, continuations of one to five tokens; every third has contexts that differ."""
    generator = np.random.default_rng(seed)
    rows, counts = [], []
    for place in range(number):
        counts.append(int(generator.integers(2, 5)))
        context = generator.integers(5, 50, 6)
        for option in range(counts[-1]):
            own = context if place % 3 else np.append(context[:3], generator.integers(5, 50, option + 1))
            continuation = generator.integers(5, 50, generator.integers(1, 6))
            tokens = np.concatenate([own, continuation]).astype(np.int32)
            rows.append(Row(tokens, np.arange(len(tokens)) >= len(own), np.zeros(len(tokens), np.int32)))
    lengths = torch.from_numpy(generator.integers(1, 9, sum(counts)))
    first = torch.tensor([0, *counts]).cumsum(0)
    gold, names = torch.zeros(number, dtype=torch.int64), torch.arange(number)
    return ChoiceExamples("task", "acc", TokenRows.of(rows), first, gold, lengths, names, 0, 0)


@torch.no_grad()
def plainly(model: Any, examples: ChoiceExamples, question: int) -> list[float]:
    scores = []
    for row in range(*examples.first_option[question : question + 2].tolist()):
        part = slice(*examples.rows.offsets[row : row + 2].tolist())
        tokens, scored = examples.rows.tokens[part].long(), examples.rows.scored[part]
        log_probabilities = model(tokens[None]).logits[0, :-1].double().log_softmax(-1)
        scores.append(float(log_probabilities.gather(1, tokens[1:, None])[scored[1:]].sum()))
    return scores


def assert_plain(model: Any, batch: ChoiceBatch, examples: ChoiceExamples, limit: float) -> None:
    with torch.no_grad():
        scores = option_log_likelihoods(model, batch, tree_limit=limit)
    for row, question in enumerate(batch["example"].tolist()):
        expected = plainly(model, examples, question) if question != FILLER else []
        assert scores[row, : len(expected)].tolist() == pytest.approx(expected, abs=1e-4)
        assert scores[row, len(expected) :].eq(-math.inf).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trees_and_options_apart_say_what_each_text_says_alone(family: str, attention: str) -> None:
    model = tiny_model(family, **{"sliding_window": 64} if "sliding_window" in EXPLICIT[family] else {})
    if family in ("gemma2", "gpt_oss") and attention == "sdpa":
        pytest.skip("transformers has it with eager attention alone")
    model.set_attn_implementation(attention)
    examples = questions()
    batch = examples.collate([3, 0, FILLER, 5, 1])
    assert int(batch["branch"].max()) > 1  # there are trees
    limit = tree_limit(model)
    assert limit >= batch["branch"].shape[1]
    assert_plain(model, batch, examples, limit)
    assert_plain(model, batch, examples, 0)


def test_a_sliding_window_reads_trees_that_fit_into_it() -> None:
    model = tiny_model("mistral", sliding_window=8)
    assert tree_limit(model) == 8
    examples = questions()
    batch = examples.collate(range(6))
    assert batch["branch"].shape[1] > 8
    assert_plain(model, batch, examples, tree_limit(model))
    with torch.no_grad(), pytest.raises(AssertionError):
        assert_plain(model, batch, examples, math.inf)


def test_attention_that_hides_nothing_reads_no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = type(model.model).forward

    def blind(self: Any, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        seen = None if attention_mask is not None and attention_mask.dim() == 4 else attention_mask
        return forward(self, *args, attention_mask=seen, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", blind)
    assert tree_limit(model) == 0
    examples = questions()
    assert_plain(model, examples.collate(range(6)), examples, tree_limit(model))


@pytest.mark.parametrize("sharded", [False, True])
def test_options_apart_are_read_in_passes_of_no_more_tokens_than_their_trees(
    monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """Devices that share a model make one pass each, because they would wait for one another forever."""
    model, passes = tiny_model("llama"), []
    examples = questions(number=12)
    batch = examples.collate(range(12))

    def counted(model: Any, tokens: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        passes.append(tuple(tokens.shape))
        return tree_states(model, tokens, *rest)

    monkeypatch.setattr("qpruner.training.answers.tree_states", counted)
    monkeypatch.setattr("qpruner.training.answers.is_sharded", lambda model: sharded)
    assert_plain(model, batch, examples, 0)
    options, most = len(examples.rows), batch["input_ids"].numel()
    assert sum(rows for rows, _ in passes) == options
    assert options * passes[0][1] > most
    assert (len(passes) == 1) == sharded
    assert sharded or all(rows * width <= most for rows, width in passes)


def test_the_answer_goes_by_the_measure_of_the_task() -> None:
    examples = questions(number=2)
    batch = examples.collate([1, FILLER])
    scores = torch.full(batch["lengths"].shape, -math.inf, dtype=torch.float64)
    scores[0, :2] = torch.tensor([-3.0, -4.0])
    batch["lengths"] = torch.zeros_like(batch["lengths"])
    batch["lengths"][0, :2] = torch.tensor([1, 2])
    record = {"task": "task", "example": 1, "gold": 0, "log_likelihoods": [-3.0, -4.0], "lengths": [1, 2]}
    assert answers(batch, scores) == [{**record, "option": 0}]
    assert answers({**batch, "measure": "acc_norm"}, scores) == [{**record, "option": 1}]
