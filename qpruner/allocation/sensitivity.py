"""What it costs a model when one item alone goes to fewer bits: measured, and estimated from one backward pass.

**Measured.** For item i and precision b let M(i, b) be the model with the weights of i as b holds them and everything
else as it was, M. Over the positions t of the calibration text

    KL(i, b)   = mean_t sum_y p_M(y | t) log(p_M(y | t) / p_M(i,b)(y | t))
    loss(i, b) = mean_t [log p_M(x_t+1 | t) - log p_M(i,b)(x_t+1 | t)].

That the sum of such rises over items tells how good a plan is holds for small rounding errors (Malinovskii et al.,
HIGGS, 2024, arXiv:2411.17525, theorem 1). Cost: one forward pass for each item and precision.

**First order** (Li et al., LLM-MQ, 2023): the loss rises by about ``|sum g (Q_b(W) - W)|``, with g the gradient of the
calibration loss and the true rounding error of b. Cost: one backward pass. At the end of a training the gradient is
noise around zero, and the sign of the product with it; what is left is of the right order at best.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpruner.allocation.items import Item
from qpruner.errors import UserError
from qpruner.likelihood import Head, hidden_states
from qpruner.plan import DENSE, Precision
from qpruner.pruning.calibration import Calibration, gradient_sums
from qpruner.quantization.bank import Bank


@torch.no_grad()
def measured_rises(
    model: Any, bank: Bank, items: Sequence[Item], precisions: Sequence[Precision], calibration: Calibration
) -> tuple[Tensor, Tensor]:
    """The rises of KL and of loss when one item alone goes to a precision, in nats per token.

    Args:
        model: narrowed and dense, on the device that computes; it is left as it was.
        bank: that holds the items in the precisions.
        items: one after the other.
        precisions: one after the other.
        calibration: this process's share of the text.

    Returns:
        KL and loss, each [items, precisions] in float64, the same in all processes.

    Raises:
        UserError: a rise is not finite.
    """
    device, was_training = next(model.parameters()).device, model.training
    sums = torch.zeros(2, len(items), len(precisions), dtype=torch.float64, device=device)
    model.eval()
    head = Head.of(model)
    for batch in calibration.batches:
        tokens = batch.tokens.to(device)
        with calibration.forward_context():
            reference = hidden_states(model, tokens)
        for row, item in enumerate(items):
            names = item.linears(model)
            for column, precision in enumerate(precisions):
                bank.place_(model, names, precision)
                with calibration.forward_context():
                    kl, rise = _distances(head, hidden_states(model, tokens), reference, tokens)
                # Means over each sequence, so that batches of any size add up to the mean over all sequences.
                sums[0, row, column] += kl.mean(1).sum()
                sums[1, row, column] += rise[:, :-1].mean(1).sum()
            bank.place_(model, names, DENSE)
    model.train(was_training)
    kl, loss = calibration.reduce(sums).cpu() / calibration.num_sequences
    for number, item in enumerate(items):
        if not (kl[number].isfinite().all() and loss[number].isfinite().all()):
            raise UserError(
                f"The rise of KL or loss by quantizing {item} is not finite. Use --model.dtype float32, or another "
                f"base model."
            )
    return kl, loss


def first_order_rises(
    model: Any, bank: Bank, items: Sequence[Item], precisions: Sequence[Precision], calibration: Calibration
) -> Tensor:
    """The rise of loss by first order, in nats per token; arguments and errors as for `measured_rises`.

    Returns:
        [items, precisions] in float64, at least 0.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for item in items for name in item.linears(model)}

    def product(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        weight = linears[name].weight.detach().float()
        errors = (bank.weight(name, precision, weight.device) - weight for precision in precisions)
        return torch.stack([(gradient * error).double().sum() for error in errors])

    sizes = dict.fromkeys(linears, len(precisions))
    sums = gradient_sums(model, linears, calibration, product, sizes=sizes, per_sequence=False)
    totals = [torch.stack([sums[name] for name in item.linears(model)]).sum(0) for item in items]
    return torch.stack(totals).abs().cpu()


def _distances(head: Head, changed: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """KL to the reference at each position, and the rise of the loss of the token after it.

    Args:
        head: of both.
        changed: hidden states [B, T, H].
        reference: hidden states [B, T, H] of the model before the change.
        tokens: [B, T].

    Returns:
        Two tensors [B, T] in float64; at the last position of a row, which predicts no token, the rise means nothing.
    """
    changed, reference, targets = changed.flatten(0, 1), reference.flatten(0, 1), tokens.roll(-1, 1).flatten()
    kl, rise = (torch.empty(len(targets), dtype=torch.float64, device=tokens.device) for _ in range(2))
    for part in head.chunks(changed):
        after, before = (F.log_softmax(head(states[part]).float(), dim=-1) for states in (changed, reference))
        kl[part] = F.kl_div(after, before, log_target=True, reduction="none").sum(-1).double()
        rise[part] = (before - after).gather(1, targets[part, None]).squeeze(1).double()
    return kl.view(tokens.shape), rise.view(tokens.shape)
