import math

import pytest
import torch
import torch.nn.functional as F

from qpruner.datamodules.questions import Measure
from qpruner.training.metrics import ChoiceAccuracy, Perplexity, evaluation_results

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
    accuracy.update(torch.zeros(1, 1), torch.zeros(1, 1), *[torch.tensor([-1])] * 2)
    assert perplexity.compute() == {"tokens": 0}
    assert accuracy.compute() == {"examples": 0}


@pytest.mark.parametrize(
    ("options", "accuracy"),
    [((-1.0, -math.inf), 0.5), ((-1.0, math.nan), math.nan), ((-math.inf, -math.inf), math.nan)],
    ids=["one impossible", "one nan", "all impossible"],
)
def test_a_choice_among_broken_likelihoods_is_no_accuracy(options: tuple[float, float], accuracy: float) -> None:
    """Of two questions the first is right, if it says anything, and the second is wrong."""
    metric = ChoiceAccuracy()
    scores, zeros = torch.tensor([options, (-2.0, -1.0)]), torch.zeros(2, dtype=torch.int64)
    metric.update(scores, torch.ones(2, 2), zeros, torch.arange(2))
    for name in ("acc", "acc_norm", "accuracy"):
        assert str(float(metric.compute()[name])) == str(accuracy)


@pytest.mark.parametrize("measure", ["acc", "acc_norm"])
def test_answers_are_the_likeliest_as_they_are_and_by_length(measure: Measure) -> None:
    scores = torch.tensor([[-3.0, -4.0, -math.inf], [-2.0, -5.0, -9.0], [-1.0, -6.0, -7.0], [-1.0, -2.0, -math.inf]])
    lengths = torch.tensor([[1, 2, 0], [1, 2, 9], [1, 7, 7], [5, 5, 0]])  # by length: -3 -2; -2 -2.5 -1; -1 -.9 -1; ...
    gold, example = torch.tensor([1, 2, 1, 0]), torch.tensor([7, 3, 5, 9])
    metric = ChoiceAccuracy(measure)
    metric.update(scores, lengths, gold, example)
    metric.update(torch.tensor([[-1.0]]), torch.tensor([[0]]), torch.tensor([0]), torch.tensor([-1]))  # a filler
    results = {name: float(value) for name, value in metric.compute().items()}
    assert results["examples"] == 4
    # The last is right either way, all others by length.
    assert (results["acc"], results["acc_norm"]) == (0.25, 1.0)
    assert results["accuracy"] == {"acc": 0.25, "acc_norm": 1.0}[measure]
    share = results["accuracy"]
    assert results["error"] == pytest.approx(math.sqrt(share * (1 - share) / 3))


def test_results_of_tasks_are_their_own_and_the_mean() -> None:
    def task(right: int, of: int) -> ChoiceAccuracy:
        metric = ChoiceAccuracy()
        gold = torch.tensor([0] * right + [1] * (of - right))
        metric.update(torch.tensor([[-1.0, -2.0]]).expand(of, 2), torch.ones(of, 2), gold, torch.arange(of))
        return metric

    results = evaluation_results(Perplexity(), {"boolq": task(3, 5), "piqa": task(9, 10)})
    assert results["boolq/acc"] == 0.6 and results["piqa/accuracy"] == 0.9 and results["examples"] == 15
    assert results["accuracy"] == 0.75
    errors = math.sqrt(0.6 * 0.4 / 4), math.sqrt(0.9 * 0.1 / 9)
    assert results["piqa/error"] == pytest.approx(errors[1])
    assert results["accuracy_error"] == pytest.approx(math.sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert "perplexity" not in results
