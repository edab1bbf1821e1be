"""What a causal language model says of tokens, from its hidden states, a few positions at a time.

The logits of all positions are the largest tensor of a language model: 8,192 positions over 151,936 words take 5 GB in
float32, several times over in a loss and its gradient. So whatever needs a loss or a prediction takes the hidden states
that the model's trunk gives, picks the positions that count, and lets the head speak of a chunk of them at a time.

Shapes: B rows, T tokens, H hidden size, V words of the vocabulary, N positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qpruner.errors import UserError

IGNORED = -100
"""The label of a position that is not scored, as torch's cross entropy has it."""
LOGITS_AT_ONCE = 2**26
"""Logits of a chunk; a loss and its gradient hold about 16 bytes for each."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: a linear, and what some families do to its result.

    Args:
        linear: linear that makes logits of hidden states.
        scale: factor that the linear's result is multiplied by: Cohere's ``logit_scale``, or one over Granite's
            ``logits_scaling``.
        cap: bound of the logits, ``cap * tanh(logits / cap)`` (Gemma 2); None for no bound.
    """

    linear: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a causal language model, perhaps with adapters."""
        causal = causal_model(model)
        config = causal.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        return cls(causal.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states [..., H], in the dtype in which the linear computes."""  # [..., V]
        logits: Tensor = self.linear(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Parts of the positions of hidden states [N, H], each small enough for its logits to be held."""
        words: int = self.linear.out_features  # type: ignore[assignment]
        size = max(LOGITS_AT_ONCE // words, 1)
        return (slice(start, start + size) for start in range(0, len(hidden), size))


def causal_model(model: Any) -> Any:
    """The causal language model below adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_head(model: Any) -> None:
    """Makes sure that a model's logits are what its `Head` makes of its hidden states.

    Raises:
        UserError: they are not: the family does something else to them.
    """
    tokens = torch.arange(4, device=model.device).unsqueeze(0)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    difference = (Head.of(model)(hidden_states(model, tokens)).float() - logits).abs().max()
    if not difference <= 1e-2 * logits.abs().max():
        raise UserError(
            f"Models of type {model.config.model_type!r} make their logits in a way that qpruner does not know: a "
            f"linear on the last hidden states, scaled or capped, gives others (off by {float(difference):.3g}). Use "
            f"another base, or add what the family does to Head in qpruner/likelihood.py."
        )


def hidden_states(model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """What the trunk of a causal language model gives to its head.

    Args:
        model: causal language model, perhaps with adapters.
        tokens: [B, T], token ids.
        attention_mask: [B, T], 1 on tokens and 0 on padding; None for all ones.
    """  # [B, T, H]
    hidden: Tensor = (
        causal_model(model)
        .base_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
        .last_hidden_state
    )
    return hidden


def token_nll(model: Any, tokens: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of each token given those before it, in nats.

    The cross entropy is taken in float32 whatever the logits are: a softmax of its own, then a logarithm, would
    overflow on confident models.

    Args:
        model: causal language model, perhaps with adapters.
        tokens: [B, T], token ids.
        labels: [B, T], the token at t, `IGNORED` where it is not scored.
        attention_mask: [B, T], 1 on tokens and 0 on padding; None for all ones.
    """  # [B, T - 1] float32, 0 where not scored
    targets = labels[:, 1:]
    places = (targets != IGNORED).nonzero(as_tuple=True)  # N of them
    hidden = hidden_states(model, tokens, attention_mask)[:, :-1][places]
    nll = hidden.new_zeros(targets.shape, dtype=torch.float32)
    return nll.index_put(places, nll_of_targets(Head.of(model), hidden, targets[places]))


def nll_of_targets(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of a target at each position.

    Args:
        head: head of the model; a head that is trained itself costs a pass more.
        hidden: [N, H], hidden states of the scored positions.
        targets: [N], token ids that the positions predict.
    """  # [N] float32
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.linear.parameters()):
        parts = [
            checkpoint(_nll, head, hidden[part], targets[part], use_reentrant=False) for part in head.chunks(hidden)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
    nll: Tensor = _ChunkedNLL.apply(hidden, targets, head)  # type: ignore[no-untyped-call]
    return nll


def _nll(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


class _ChunkedNLL(torch.autograd.Function):
    """The losses of positions under a frozen head, and while a chunk's logits are there, their slopes.

    The loss of a position depends on the hidden state at this position alone, so that one vector [H] for each position
    is all that the backward pass needs, whatever weight each loss has by then.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        assert isinstance(head, Head)
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in head.chunks(hidden):
            if slopes is None:
                nll[part] = _nll(head, hidden[part], targets[part])
            else:
                with torch.enable_grad():
                    states = hidden[part].detach().requires_grad_()
                    losses = _nll(head, states, targets[part])
                    (slopes[part],) = torch.autograd.grad(losses.sum(), states)
                nll[part] = losses.detach()
        ctx.slopes = slopes
        return nll

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient.unsqueeze(1) * ctx.slopes).to(ctx.slopes.dtype), None, None
