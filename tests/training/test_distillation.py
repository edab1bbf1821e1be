"""Losses against a teacher, against two-line references on whole logits."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.families import VOCAB, adapted, random_tokens, tiny_model
from torch import Tensor

from qpruner import likelihood
from qpruner.errors import UserError
from qpruner.likelihood import Head, Scored
from qpruner.training.distillation import (
    DistillationConfig,
    Lesson,
    Losses,
    distillation_losses,
    forward_kl,
    likeliest,
    truncated_kl,
)

STUDENT, TAUGHT = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)) * 3


def reference_kl(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    p, q = (torch.softmax(one.double() / temperature, -1) for one in (taught, logits))
    return (p * (p.log() - q.log())).sum(-1).float()


def test_the_divergence_is_that_of_two_softmaxes_at_the_temperature() -> None:
    for temperature in (0.5, 1.0, 2.0):
        kl = forward_kl(STUDENT, TAUGHT, temperature)
        torch.testing.assert_close(kl, reference_kl(STUDENT, TAUGHT, temperature))
    assert forward_kl(TAUGHT, TAUGHT, 2.0).abs().max() < 1e-6
    # By hand: (1/2, 1/2) from (1/4, 3/4) is ln(2) / 2 + ln(2/3) / 2.
    by_hand = (math.log(2) + math.log(2 / 3)) / 2
    assert float(forward_kl(torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2), 1.0)) == pytest.approx(by_hand)


@pytest.mark.parametrize("top_k", [1, 4, 11])
def test_truncation_loses_the_divergence_among_the_other_words_and_nothing_else(top_k: int) -> None:
    temperature = 1.5
    said, words = likeliest(TAUGHT, temperature, top_k)
    p, q = (torch.softmax(one.double() / temperature, -1) for one in (TAUGHT, STUDENT))
    torch.testing.assert_close(said.double().exp().sum(-1), torch.ones(5).double())
    torch.testing.assert_close(said[:, :-1].double().exp(), p.topk(top_k).values)
    assert torch.equal(words.long(), p.topk(top_k).indices)
    others = torch.ones(5, 12, dtype=torch.bool).scatter(1, words.long(), False)
    p_others, q_others = (one[others].view(5, -1) for one in (p, q))
    mass = p_others.sum(-1, keepdim=True)
    among = (p_others / mass * (p_others / mass / (q_others / q_others.sum(-1, keepdim=True))).log()).sum(-1)
    lost = (mass.squeeze(1) * among).float()
    kl = truncated_kl(STUDENT, said, words, temperature)
    torch.testing.assert_close(kl, reference_kl(STUDENT, TAUGHT, temperature) - lost)
    assert (lost > 1e-3).all() if top_k < 11 else lost.abs().max() < 1e-6
    # Half floats, as they are kept, cost a relative 2^-11 of a log-probability and leave a distribution.
    torch.testing.assert_close(truncated_kl(STUDENT, said.half(), words, temperature), kl, rtol=5e-3, atol=2e-3)
    assert truncated_kl(TAUGHT, said.half(), words, temperature).abs().max() < 1e-5


def test_a_truncated_divergence_has_the_gradient_of_its_buckets() -> None:
    said, words = likeliest(TAUGHT, 2.0, 11)
    gradients = []
    for kl in (lambda logits: truncated_kl(logits, said, words, 2.0), lambda logits: forward_kl(logits, TAUGHT, 2.0)):
        logits = STUDENT.clone().requires_grad_()
        gradients += torch.autograd.grad(kl(logits).sum(), logits)
    torch.testing.assert_close(gradients[0], gradients[1])


def lessons(teacher: Any, tokens: Tensor, temperature: float) -> Lesson:
    scored, head = Scored.of(teacher, tokens, tokens), Head.of(teacher)
    return Lesson(lambda logits, part: forward_kl(logits, head(scored.hidden[part]), temperature), scored.hidden)


@pytest.mark.parametrize("at_once", [2**26, 6 * VOCAB + 1])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    family: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    changes = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    student, teacher = adapted(tiny_model(family, **changes)), tiny_model(family, **changes).requires_grad_(False)
    seen: list[int] = []
    Head.of(student).linear.register_forward_hook(lambda *args: seen.append(args[2].numel()))
    config = DistillationConfig(logits=0.7, hidden=0.3, cross_entropy=0.2, temperature=1.7)
    tokens = random_tokens()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    logits, taught = (model(input_ids=tokens).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    states = [likelihood.hidden_states(model, tokens)[:, :-1].flatten(0, 1) for model in (student, teacher)]
    nll = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    kl, mse = reference_kl(logits, taught, 1.7), (states[0] - states[1]).pow(2).mean(-1)
    expected = 0.2 * nll + 0.7 * 1.7**2 * kl + 0.3 * mse
    seen.clear()
    scored = Scored.of(student, tokens, tokens)
    losses = distillation_losses(config, Head.of(student), scored, lessons(teacher, tokens, 1.7))
    assert max(seen) <= at_once / 2 and len(seen) == (1 if at_once == 2**26 else 8)
    torch.testing.assert_close(losses.total, expected, rtol=1e-4, atol=1e-5)
    for name, part in {"loss": nll, "kl": kl, "hidden": mse}.items():
        torch.testing.assert_close(losses.parts[name], part.detach(), rtol=1e-4, atol=1e-5)
        assert not losses.parts[name].requires_grad
    weights = torch.rand(22)
    ours = torch.autograd.grad((losses.total * weights).sum(), trained)
    for gradient, right in zip(ours, torch.autograd.grad((expected * weights).sum(), trained), strict=True):
        assert (gradient - right).norm() <= 1e-4 * right.norm()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_what_has_no_weight_is_left_out() -> None:
    student, tokens = adapted(tiny_model("llama")), random_tokens()
    teacher = tiny_model("llama").requires_grad_(False)

    def losses(**weights: float) -> Losses:
        config = DistillationConfig(**weights)  # type: ignore[arg-type]
        scored = Scored.of(student, tokens, tokens)
        return distillation_losses(config, Head.of(student), scored, lessons(teacher, tokens, config.temperature))

    hidden = losses(logits=0, hidden=1, cross_entropy=0)
    assert hidden.parts.keys() == {"loss", "hidden"}
    torch.testing.assert_close(hidden.total.detach(), hidden.parts["hidden"])
    logits = losses(logits=1, cross_entropy=0, temperature=1)
    assert logits.parts.keys() == {"loss", "kl"}
    torch.testing.assert_close(logits.total.detach(), logits.parts["kl"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": 0.0}, r"^distillation.temperature is 0.0; it must be above 0 and finite.$"),
        ({"temperature": -1.0}, r"^distillation.temperature is -1.0; "),
        ({"logits": -0.5}, r"^distillation.logits is -0.5; it must be at least 0 and finite.$"),
        ({"hidden": math.nan}, r"^distillation.hidden is nan; "),
        ({"cross_entropy": -1.0}, r"^distillation.cross_entropy is -1.0; "),
        ({"top_k": 0}, r"^distillation.top_k is 0; it must be at least 1.$"),
        ({"logits": 0.0}, r"logits and distillation.hidden are both 0.*leave distillation out"),
        ({"device": "gpu"}, r"^distillation.device is 'gpu', which is no device"),
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DistillationConfig(**wrong)
