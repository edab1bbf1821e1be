"""Scores the answer options of multiple-choice questions with a causal language model.

The options of a question share a prefix, often nearly all of their text. So each question is one row that holds a tree:
the shared trunk once, followed by one branch per option, whose positions are those that it would have directly after
the trunk and whose mask hides the other branches. This is exact for attention that accepts such a mask; for any other
model each option becomes a row of its own.

Shapes: B questions, T tokens, S scored tokens of a question, O options.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qpruner.datamodules.choices import NOTHING, ChoiceBatch
from qpruner.likelihood import Head, causal_model, nll_of_targets
from qpruner.training.sharding import is_sharded

SAME = 0.05
"""Largest relative difference of hidden states that rounding alone can cause: bfloat16 has 8 bits of precision, and a
branch that is attended to by mistake changes them by more."""


def option_log_likelihoods(model: Any, batch: ChoiceBatch, *, tree_limit: float) -> Tensor:
    """Log-likelihood of the continuation of each option, in nats.

    Args:
        model: causal language model, perhaps with adapters.
        batch: questions.
        tree_limit: maximum number of tokens in a tree that the model reads; see `tree_limit`. Where the batch has
            longer trees, each option becomes a row of its own.
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
    """Maximum tokens in a tree whose branches a model reads independently: 0, its sliding window, or infinity.

    This is determined by experiment, on a trunk of two tokens with two branches of three. Attention with a sliding
    window uses a given mask unchanged, and so reads trees that fit into the window.

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
    except (RuntimeError, TypeError, ValueError, IndexError):  # raised by models that do not accept such arguments
        return 0
    apart = (branch == 0) | (branch == 2)
    alone = tree_states(model, tokens[None, apart], positions[None, apart], torch.zeros_like(branch[None, apart]))
    difference = (together - alone[0, 2:]).float().norm() / alone[0, 2:].float().norm()
    return (getattr(config, "sliding_window", None) or math.inf) if difference <= SAME else 0


def tree_states(model: Any, tokens: Tensor, positions: Tensor, branch: Tensor) -> Tensor:
    """Last hidden states, the input of the head, for rows that may be trees; see `ChoiceBatch`.

    Args:
        model: causal language model, perhaps with adapters.
        tokens: token ids, [B, T].
        positions: position of each token in the text of its option, [B, T].
        branch: branch of each token, [B, T].
    """  # [B, T, H]
    causal = causal_model(model)
    arguments: dict[str, Tensor] = {"attention_mask": (branch != NOTHING).long()}
    if bool((branch > 0).any()):
        arguments = {"attention_mask": _mask(causal, branch), "position_ids": positions}
    hidden: Tensor = causal.base_model(input_ids=tokens, use_cache=False, **arguments).last_hidden_state
    return hidden


def _mask(causal: Any, branch: Tensor) -> Tensor:
    """Attention mask of trees: a token attends to itself and to earlier tokens of the trunk or of its own branch."""
    # [B, 1, T, T]; padding attends to padding, because a softmax over nothing is nan
    places = torch.arange(branch.shape[1], device=branch.device)
    keys, queries = branch[:, None, :], branch[:, :, None]
    seen = (places[None, None, :] <= places[None, :, None]) & ((keys == 0) | (keys == queries))
    if causal.config.get_text_config()._attn_implementation == "sdpa":
        return seen[:, None]
    hidden = torch.zeros_like(seen, dtype=causal.dtype).masked_fill(~seen, torch.finfo(causal.dtype).min)
    return hidden[:, None]


def _states_apart(model: Any, batch: ChoiceBatch, question: Tensor, option: Tensor, source: Tensor) -> Tensor:
    """Hidden states that predict the scored tokens, computed with each option as a row of its own.

    No pass has more tokens than the batch of trees, unless the model is sharded: its devices gather the layers together
    in each pass, and so have to make equally many.
    """  # [N, H]
    branch = batch["branch"]
    pairs, row_of = torch.unique(torch.stack([question, option], dim=1), dim=0, return_inverse=True)
    belongs = [(branch[q] == 0) | (branch[q] == o + 1) for q, o in pairs.tolist()]
    rows = [batch["input_ids"][q][mask] for (q, _), mask in zip(pairs.tolist(), belongs, strict=True)]
    tokens = pad_sequence(rows, batch_first=True, padding_value=0)
    real = pad_sequence([torch.zeros_like(row) for row in rows], batch_first=True, padding_value=NOTHING)
    at_once = len(rows) if is_sharded(model) else branch.numel() // tokens.shape[1]
    parts = [slice(first, first + at_once) for first in range(0, len(rows), at_once)]
    hidden = torch.cat([tree_states(model, tokens[part], torch.zeros_like(tokens[part]), real[part]) for part in parts])
    places = torch.stack(belongs).cumsum(1) - 1  # position of each token of the tree in its option's row
    return hidden[row_of, places[row_of, source]]


def answers(batch: ChoiceBatch, log_likelihoods: Tensor) -> list[dict[str, Any]]:
    """One record for each question: the log-likelihoods of its options, and the option chosen by the task's measure.

    Args:
        batch: questions; filler rows are left out of the result.
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
