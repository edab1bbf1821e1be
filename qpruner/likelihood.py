"""Likelihoods of tokens under a causal language model, computed from hidden states, a few positions at a time.

The logits of all positions are the largest tensor of a language model: 8,192 positions with a vocabulary of 151,936
take 5 GB in float32, and a loss with its gradient several times as much. So code that needs a loss or a prediction
takes the last hidden states, selects the positions that count, and applies the head to a chunk of them at a time.

Shapes: B rows, T tokens, H hidden size, V words of the vocabulary, N positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qpruner.errors import UserError

IGNORED = -100
"""The label of a position that is not scored, as torch's cross entropy has it."""
LOGITS_AT_ONCE = 2**25
"""Logits of a chunk; a loss and its gradient hold about 16 bytes for each."""

ChunkLosses = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""K losses [n] of the positions of a chunk, from its logits [n, V] as the head gives them and its place among all."""


@dataclass(frozen=True)
class Head:
    """The language-model head: a linear, and the scaling or capping that some families apply to its output.

    Args:
        linear: linear that maps hidden states to logits.
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

    def chunks(self, hidden: Tensor, heads: int = 1) -> Iterator[slice]:
        """Parts of the positions of hidden states [N, H], each small enough for its logits to be held.

        Args:
            hidden: hidden states of all positions.
            heads: number of models whose logits of a chunk are held together.
        """
        words: int = self.linear.out_features  # type: ignore[assignment]
        size = max(LOGITS_AT_ONCE // (words * heads), 1)
        return (slice(start, start + size) for start in range(0, len(hidden), size))


def causal_model(model: Any) -> Any:
    """The causal language model below adapters, if there are any."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def check_head(model: Any) -> None:
    """Makes sure that a model's logits are what its `Head` makes of its hidden states.

    Raises:
        UserError: the model's family computes its logits differently.
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
    """The last hidden states of a causal language model, which are the input of its head.

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


@dataclass(frozen=True)
class Scored:
    """The last hidden states of a model at the scored positions.

    Args:
        hidden: [N, H], hidden states that predict the scored tokens, row by row.
        targets: [N], the scored tokens.
        places: row and column of each of them among the targets [B, T - 1].
    """

    hidden: Tensor
    targets: Tensor
    places: tuple[Tensor, ...]

    @classmethod
    def of(cls, model: Any, tokens: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> "Scored":
        """Runs the trunk of a model on a batch; see `token_nll`."""
        targets = labels[:, 1:]
        places = (targets != IGNORED).nonzero(as_tuple=True)
        return cls(hidden_states(model, tokens, attention_mask)[:, :-1][places], targets[places], places)


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
    scored = Scored.of(model, tokens, labels, attention_mask)
    nll = scored.hidden.new_zeros((tokens.shape[0], tokens.shape[1] - 1), dtype=torch.float32)
    return nll.index_put(scored.places, nll_of_targets(Head.of(model), scored.hidden, scored.targets))


def nll_of_targets(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of a target at each position.

    Args:
        head: head of the model; a head that is trained itself costs a pass more.
        hidden: [N, H], hidden states of the scored positions.
        targets: [N], token ids that the positions predict.
    """  # [N] float32
    return losses_in_chunks(head, hidden, lambda logits, part: (nll_of_logits(logits, targets[part]),))[0]


def nll_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of targets [n], from logits [n, V] of any number format."""  # [n] float32
    return F.cross_entropy(logits.float(), targets, reduction="none")


def losses_in_chunks(
    head: Head, hidden: Tensor, losses: ChunkLosses, weights: Sequence[float] = (1.0,), *, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """Losses of positions that depend on their logits, a chunk of positions at a time.

    Args:
        head: head of the model; a head that is trained itself costs a pass more.
        hidden: [N, H], hidden states of the scored positions.
        losses: function that gives the K losses of a chunk.
        weights: [K], weight of each loss.
        heads: number of models whose logits of a chunk ``losses`` holds, this one included.

    Returns:
        The weighted sum of the losses at each position, [N] float32, and each loss alone, [N, K] without a gradient.
    """

    def weighed(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        values = torch.stack(losses(logits, part), dim=-1)
        # No product of matrices, which autocast would round.
        return (values * values.new_tensor(weights)).sum(-1), values.detach()

    chunks = head.chunks(hidden, heads)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.linear.parameters()):

        def of_states(states: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            return weighed(head(states), part)

        pairs = [checkpoint(of_states, hidden[part], part, use_reentrant=False) for part in chunks]
        nothing = hidden.new_zeros((0, len(weights)), dtype=torch.float32)
        totals, values = zip(*pairs, strict=True) if pairs else ((nothing.sum(-1),), (nothing,))
        return torch.cat(totals), torch.cat(values)
    results: tuple[Tensor, Tensor] = _ChunkedLosses.apply(  # type: ignore[no-untyped-call]
        hidden, head, list(chunks), weighed, len(weights)
    )
    return results


class _ChunkedLosses(torch.autograd.Function):
    """The losses of positions under a frozen head, and while a chunk's logits are there, their slopes.

    The loss of a position depends on the hidden state at this position alone, so that one vector [H] for each position
    is all that the backward pass needs, whatever weight each loss has by then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Callable[[Tensor], Tensor],
        chunks: Sequence[slice],
        weighed: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        num_losses: int,
    ) -> tuple[Tensor, Tensor]:
        total = hidden.new_empty(len(hidden), dtype=torch.float32)
        values = hidden.new_empty((len(hidden), num_losses), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for part in chunks:
            if slopes is None:
                total[part], values[part] = weighed(head(hidden[part]), part)
            else:
                with torch.enable_grad():
                    states = hidden[part].detach().requires_grad_()
                    sums, values[part] = weighed(head(states), part)
                    (slopes[part],) = torch.autograd.grad(sums.sum(), states)
                total[part] = sums.detach()
        ctx.slopes = slopes
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        return (gradient.unsqueeze(1) * ctx.slopes).to(ctx.slopes.dtype), None, None, None, None
