"""What a causal language model says of the options of questions.

The options of a question have their beginning in common, often nearly all of their text. So a question is one row, a
tree: the trunk once, behind it the branch of each option, with positions as if it stood alone behind the trunk and a
mask that hides the other branches. That is exact for attention that takes such a mask; for any other model the options
are taken apart again.

Shapes: B questions, T tokens, S scored tokens of a question, O options.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qpruner.datamodules.choices import NOTHING, ChoiceBatch
from qpruner.likelihood import Head, causal_model, nll_of_targets

SAME = 0.05
"""Largest difference of hidden states, as a share of their size, that rounding alone makes: a bfloat16 has 8 bits, and
a branch that is seen by mistake moves them by more."""


def option_log_likelihoods(model: Any, batch: ChoiceBatch, *, tree_limit: float) -> Tensor:
    """Log-likelihood of the continuation of each option, in nats.

    Args:
        model: causal language model, perhaps with adapters.
        batch: questions.
        tree_limit: most tokens of a tree that the model reads; see `tree_limit`. Otherwise each option becomes a row.
    """  # [B, O] float64; -inf where a question has no such option
    scored = batch["options"] != NOTHING
    question, place = scored.nonzero(as_tuple=True)
    option, targets = batch["options"][scored], batch["targets"][scored]
    if batch["branch"].shape[1] <= tree_limit or not bool((batch["branch"] > 0).any()):
        hidden = tree_states(model, batch["input_ids"], batch["positions"], batch["branch"])
        states = hidden[question, batch["sources"][scored]]
    else:
        states = _states_apart(model, batch, question, option, batch["sources"][scored])
    nll = nll_of_targets(Head.of(model), states, targets)
    shape = batch["lengths"].shape
    sums = torch.zeros(shape, dtype=torch.float64, device=nll.device)
    sums.index_put_((question, option), -nll.double(), accumulate=True)
    return sums.masked_fill(batch["lengths"] == 0, -torch.inf)


@torch.no_grad()
def tree_limit(model: Any) -> float:
    """Most tokens of a tree whose branches a model reads as if each stood alone: none, a window, or any number.

    It is tried out, on a trunk of two tokens with two branches of three. Attention with a sliding window takes a mask
    as it is, and so reads trees that fit into the window.

    Args:
        model: causal language model, perhaps with adapters.
    """
    config = causal_model(model).config.get_text_config()
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return 0
    device = model.device
    tokens = torch.arange(8, device=device) % config.vocab_size
    positions = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4], device=device)
    branch = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2], device=device)
    try:
        together = tree_states(model, tokens[None], positions[None], branch[None])[0, 5:]
    except (RuntimeError, TypeError, ValueError, IndexError):  # of a model that does not take such arguments
        return 0
    apart = (branch == 0) | (branch == 2)
    alone = tree_states(model, tokens[None, apart], positions[None, apart], torch.zeros_like(branch[None, apart]))
    difference = (together - alone[0, 2:]).float().norm() / alone[0, 2:].float().norm()
    return (getattr(config, "sliding_window", None) or math.inf) if difference <= SAME else 0


def tree_states(model: Any, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
    """What the trunk of a model gives to its head for rows that may be trees; see `ChoiceBatch`.

    Args:
        model: causal language model, perhaps with adapters.
        tokens: token ids, [B, T].
        positions: place of each token in the text of its option, [B, T].
        branch: branch of each token, [B, T].
    """  # [B, T, H]
    causal = causal_model(model)
    arguments: dict[str, Tensor] = {"attention_mask": (branch != NOTHING).long()}
    if bool((branch > 0).any()):
        arguments = {"attention_mask": _mask(causal, branch), "position_ids": positions}
    hidden: Tensor = causal.base_model(input_ids=tokens, use_cache=False, **arguments).last_hidden_state
    return hidden


def _mask(causal: Any, branch: Tensor) -> Tensor:
    """What each token of a tree sees: itself, and what stands before it in the trunk or in its own branch."""
    # [B, 1, T, T]; padding sees padding, because a softmax over nothing is nan
    places = torch.arange(branch.shape[1], device=branch.device)
    keys, queries = branch[:, None, :], branch[:, :, None]
    seen = (places[None, None, :] <= places[None, :, None]) & ((keys == 0) | (keys == queries))
    if causal.config.get_text_config()._attn_implementation == "sdpa":
        return seen[:, None]
    hidden = torch.zeros_like(seen, dtype=causal.dtype).masked_fill(~seen, torch.finfo(causal.dtype).min)
    return hidden[:, None]


def _states_apart(model: Any, batch: ChoiceBatch, question: Tensor, option: Tensor, source: Tensor) -> Tensor:
    """Hidden states at the sources of the scored tokens, each option a row of its own."""  # [N, H]
    branch = batch["branch"]
    pairs, row_of = torch.unique(torch.stack([question, option], dim=1), dim=0, return_inverse=True)
    belongs = [(branch[q] == 0) | (branch[q] == o + 1) for q, o in pairs.tolist()]
    rows = [batch["input_ids"][q][mask] for (q, _), mask in zip(pairs.tolist(), belongs, strict=True)]
    tokens = pad_sequence(rows, batch_first=True, padding_value=0)
    real = pad_sequence([torch.zeros_like(row) for row in rows], batch_first=True, padding_value=NOTHING)
    hidden = tree_states(model, tokens, torch.zeros_like(tokens), real)
    places = torch.stack(belongs).cumsum(1) - 1  # of each token of the tree in its option's row
    return hidden[row_of, places[row_of, source]]


def answers(batch: ChoiceBatch, log_likelihoods: Tensor) -> list[dict[str, Any]]:
    """One record for each question: what is said of its options, and which is chosen by the task's measure.

    Args:
        batch: questions, of which fillers are left out.
        log_likelihoods: log-likelihood of each option, [B, O].
    """
    lengths = batch["lengths"]
    by_length = log_likelihoods / lengths.clamp(min=1)
    chosen = (by_length if batch["measure"] == "acc_norm" else log_likelihoods).argmax(1)
    return [
        {
            "task": batch["task"],
            "example": int(batch["example"][row]),
            "option": int(chosen[row]),
            "gold": int(batch["gold"][row]),
            "log_likelihoods": log_likelihoods[row, lengths[row] > 0].tolist(),
            "lengths": lengths[row, lengths[row] > 0].tolist(),
        }
        for row in range(len(lengths))
        if batch["example"][row] >= 0
    ]
