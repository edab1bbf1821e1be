import math

import pytest
import torch
import torch.nn.functional as F

from qpruner.training.metrics import ChoiceAccuracy, Perplexity, choose

B, T, V = 4, 9, 11


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, T, V)


@pytest.fixture
def labels() -> torch.Tensor:
    labels = torch.randint(V, (B, T))
    labels[0, 5:] = -100
    labels[1, :3] = -100
    return labels


def token_nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return nll.view(targets.shape)


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens(logits: torch.Tensor, labels: torch.Tensor) -> None:
    metric = Perplexity()
    metric.update(token_nll(logits, labels), labels, torch.tensor([7, 5, 0, 0]))
    result = metric.compute()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten())
    assert float(result["loss"]) == pytest.approx(float(expected), rel=1e-7)
    assert float(result["perplexity"]) == pytest.approx(math.exp(expected), rel=1e-7)
    assert int(result["tokens"]) == 4 + 6 + 8 + 8
    assert float(result["bits_per_byte"]) == pytest.approx(float(expected) * 26 / math.log(2) / 12, rel=1e-7)


def test_batches_padding_and_ranks_do_not_change_the_sums(logits: torch.Tensor, labels: torch.Tensor) -> None:
    whole, parts = Perplexity(), [Perplexity(), Perplexity()]
    whole.update(token_nll(logits, labels), labels, torch.ones(B, dtype=torch.int64))
    for row in range(B):
        padded_logits = F.pad(logits[row : row + 1], (0, 0, 0, 3), value=5.0)
        padded_labels = F.pad(labels[row : row + 1], (0, 3), value=-100)
        parts[row % 2].update(token_nll(padded_logits, padded_labels), padded_labels, torch.ones(1, dtype=torch.int64))
    assert sum(int(part.tokens) for part in parts) == int(whole.tokens)
    assert sum(int(part.num_bytes) for part in parts) == B
    assert float(sum(part.nll for part in parts)) == pytest.approx(float(whole.nll), rel=1e-12)
    assert all(part.nll.dtype == torch.float64 and part.tokens.dtype == torch.int64 for part in parts)


def test_unknown_bytes_give_no_bits_per_byte(logits: torch.Tensor, labels: torch.Tensor) -> None:
    metric = Perplexity()
    metric.update(token_nll(logits, labels), labels, torch.zeros(B, dtype=torch.int64))
    assert metric.compute().keys() == {"tokens", "loss", "perplexity"}


@pytest.mark.parametrize(("value", "perplexity"), [(math.nan, "nan"), (math.inf, "inf"), (800.0, "inf")])
def test_what_is_not_finite_is_measured_and_not_unknown(value: float, perplexity: str) -> None:
    metric = Perplexity()
    metric.update(torch.full((1, 3), value), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([5]))
    results = {name: float(one) for name, one in metric.compute().items()}
    assert str(results["loss"]) == str(value) and str(results["perplexity"]) == perplexity
    assert str(results["bits_per_byte"]) == str(value * 3 / math.log(2) / 5) and results["tokens"] == 3


def test_nothing_scored_is_unknown() -> None:
    perplexity, accuracy = Perplexity(), ChoiceAccuracy()
    perplexity.update(torch.zeros(1, 3), torch.full((1, 4), -100), torch.tensor([0]))
    accuracy.update(*[torch.zeros(1, 0)], torch.full((1, 1), -100), *[torch.tensor([-1])] * 3)
    assert perplexity.compute() == {"tokens": 0}
    assert accuracy.compute() == {"examples": 0}


@pytest.mark.parametrize(
    ("options", "accuracy"),
    [((1.0, math.inf), 0.5), ((1.0, math.nan), math.nan), ((math.inf, math.inf), math.nan)],
    ids=["one impossible", "one nan", "all impossible"],
)
def test_a_choice_among_broken_likelihoods_is_no_accuracy(options: tuple[float, float], accuracy: float) -> None:
    """Of two examples the first is right, if it says anything, and the second is wrong."""
    labels, nll = torch.zeros(4, 2, dtype=torch.int64), torch.tensor([*options, 2.0, 1.0])[:, None]
    metric = ChoiceAccuracy()
    metric.update(nll, labels, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.zeros(4, dtype=torch.long))
    assert str(float(metric.compute()["accuracy"])) == str(accuracy)


def test_choice_goes_to_the_lowest_mean_and_fillers_do_not_count() -> None:
    # Example 7 has three options of 1, 2 and 2 scored tokens, example 9 has two; the last row fills a shard.
    labels = torch.full((6, 4), -100)
    for row, (first, last) in enumerate([(1, 2), (1, 3), (2, 4), (1, 4), (1, 2), (0, 0)]):
        labels[row, first:last] = 0
    nll = torch.zeros(6, 3)
    nll[0, 0] = 3.0  # mean 3.0
    nll[1, :2] = torch.tensor([2.0, 3.0])  # mean 2.5: the answer, although its sum is larger than that of row 0
    nll[2, 1:] = torch.tensor([4.0, 4.0])
    nll[3, :] = 1.0  # mean 1.0
    nll[4, 0] = 0.5  # mean 0.5: the answer
    example = torch.tensor([7, 7, 7, 9, 9, -1])
    option = torch.tensor([0, 1, 2, 0, 1, 0])
    gold = torch.tensor([1, 1, 1, 0, 0, 0])
    assert choose(nll[:5], labels[:5], example[:5]).tolist() == [1, 4]
    metric = ChoiceAccuracy()
    metric.update(nll, labels, example, option, gold)
    assert {name: float(value) for name, value in metric.compute().items()} == {"accuracy": 0.5, "examples": 2.0}


def test_a_batch_of_fillers_alone_adds_nothing() -> None:
    metric = ChoiceAccuracy()
    metric.update(torch.zeros(1, 0), torch.full((1, 1), -100), torch.tensor([-1]), torch.tensor([0]), torch.tensor([0]))
    assert int(metric.examples) == 0
