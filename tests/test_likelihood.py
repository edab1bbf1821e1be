"""Losses from hidden states, against the logits of the whole model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.families import HIDDEN, VOCAB, adapted, random_tokens, tiny_model
from torch import Tensor
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

from qpruner import likelihood
from qpruner.anatomy import FAMILIES
from qpruner.errors import UserError
from qpruner.likelihood import IGNORED, Head, check_head, hidden_states, nll_of_targets, token_nll

SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    **{family: lambda family=family: tiny_model(family) for family in FAMILIES},  # type: ignore[misc]
    "gemma2 with a low cap": lambda: tiny_model("gemma2", final_logit_softcapping=2.0),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval(),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)).eval(),
}


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three positions, so that the last one is shorter."""
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 3 * VOCAB + 1)


def nll_of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2).double(), targets, ignore_index=IGNORED, reduction="none")
    return nll.float()


def ragged_labels(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[0, 7:] = IGNORED
    labels[1, :4] = IGNORED
    return labels


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_whole_logits(name: str) -> None:
    model = adapted(MODELS[name]())
    tokens = random_tokens()
    labels, mask = ragged_labels(tokens), torch.ones_like(tokens)
    mask[0, 9:] = 0
    weights = torch.rand(2, 11)  # a loss of its own for each token: slopes are kept before these are known
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = nll_of_logits(model(input_ids=tokens, attention_mask=mask).logits, labels)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), trained)
    nll = token_nll(model, tokens, labels, mask)
    assert nll.shape == (2, 11) and nll.dtype == torch.float32
    assert torch.allclose(nll, expected, atol=1e-5)
    assert (nll == 0).sum() == 8
    for gradient, right in zip(torch.autograd.grad((nll * weights).sum(), trained), expected_gradients, strict=True):
        assert (gradient - right).norm() <= 1e-4 * right.norm()


@pytest.mark.usefixtures("few_at_once")
def test_a_head_that_is_trained_gets_its_gradient() -> None:
    model = tiny_model("llama")
    model.requires_grad_(False)
    weight = model.lm_head.weight.requires_grad_()
    tokens = random_tokens()
    (expected,) = torch.autograd.grad(nll_of_logits(model(input_ids=tokens).logits, tokens).sum(), weight)
    (gradient,) = torch.autograd.grad(token_nll(model, tokens, tokens).sum(), weight)
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_no_more_logits_are_held_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").requires_grad_(False)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    hidden = hidden_states(model, random_tokens()).flatten(0, 1).requires_grad_()
    targets = torch.arange(24)
    for at_once, chunks in ((10 * VOCAB, [10, 10, 4]), (1, [1] * 24), (2**26, [24])):
        seen.clear()
        monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
        nll_of_targets(Head.of(model), hidden, targets).sum().backward()
        assert seen == [size * VOCAB for size in chunks]


def test_nothing_scored_is_no_loss_and_no_gradient() -> None:
    model = adapted(tiny_model("llama"))
    tokens = random_tokens()
    nll = token_nll(model, tokens, torch.full_like(tokens, IGNORED))
    assert not nll.any()
    nll.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad and p.grad is not None)


def test_the_loss_of_a_confident_model_is_exact_where_a_softmax_would_underflow() -> None:
    head = Head(torch.nn.Linear(2, 2, bias=False))
    torch.nn.init.eye_(head.linear.weight)  # type: ignore[arg-type]
    head.linear.requires_grad_(False)
    assert nll_of_targets(head, torch.tensor([[300.0, 0.0]]), torch.tensor([1])).tolist() == [300.0]


def test_bfloat16_is_as_near_to_float64_as_the_whole_logits_are() -> None:
    model = tiny_model("llama").bfloat16()
    tokens = random_tokens(8, 64)
    with torch.no_grad():
        exact = nll_of_logits(model.lm_head.double()(hidden_states(model, tokens).double()), tokens)
        model.lm_head.bfloat16()
        ours = token_nll(model, tokens, tokens)
        whole = nll_of_logits(model(input_ids=tokens).logits, tokens)
    assert (ours - exact).abs().mean() <= 1.01 * (whole - exact).abs().mean()
    assert float(ours.mean()) == pytest.approx(float(exact.mean()), rel=2e-3)


def test_a_family_that_does_something_else_to_its_logits_is_refused() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)).eval()
    check_head(model)

    def double(module: Any, inputs: Any, output: Any) -> None:
        output.logits *= 2

    model.register_forward_hook(double)
    with pytest.raises(UserError, match=r"'granite' make their logits in a way .*off by"):
        check_head(model)
