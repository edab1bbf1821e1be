"""Cost of quantizing one item alone to fewer bits: measured, and estimated from one backward pass.

**Measured.** For item i and precision b, let M(i, b) be the model M with the weights of item i as b represents them and
everything else unchanged. Over the positions t of the calibration text

    KL(i, b)   = mean_t sum_y p_M(y | t) log(p_M(y | t) / p_M(i,b)(y | t))
    loss(i, b) = mean_t [log p_M(x_t+1 | t) - log p_M(i,b)(x_t+1 | t)].

The sum of such rises over items is a good measure of a plan if rounding errors are small (Malinovskii et al., HIGGS,
2024, arXiv:2411.17525, theorem 1). Cost: for each item and precision, a forward pass through the item's block and those
after it, and through the head.

**First order** (Li et al., LLM-MQ, 2023): the loss rises by about ``|sum g (Q_b(W) - W)|``, with g the gradient of the
calibration loss and the true rounding error of b. Cost: one backward pass. At the end of training the gradient is noise
around zero, and so is the sign of the product with it; what remains is of the right order of magnitude at best.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qpruner.allocation.items import Item
from qpruner.calibration.blocks import BlockRunner, block_runner
from qpruner.calibration.gradients import gradient_sums
from qpruner.calibration.text import Calibration, micro_batches
from qpruner.errors import UserError
from qpruner.likelihood import LOGITS_AT_ONCE, Head
from qpruner.plan import DENSE, Precision
from qpruner.quantization.bank import Bank


@torch.no_grad()
def measured_rises(
    model: Any, bank: Bank, items: Sequence[Item], precisions: Sequence[Precision], calibration: Calibration
) -> tuple[Tensor, Tensor]:
    """The rises of KL and of loss when one item alone is quantized to a precision, in nats per token.

    Args:
        model: narrowed and dense model, on the device that computes; it is left unchanged.
        bank: bank that holds the items in the precisions.
        items: items to quantize, one after the other.
        precisions: precisions to quantize each item to, one after the other.
        calibration: this process's share of the text.

    Returns:
        Rises of KL and of loss, each [items, precisions] in float64, the same in all processes.

    Raises:
        UserError: a rise is not finite.
    """
    processes = calibration.processes
    sums = torch.zeros(2, len(items), len(precisions), dtype=torch.float64, device=processes.device)
    words: int = Head.of(model).linear.out_features  # type: ignore[assignment]
    for shared in calibration.batches:
        for batch in micro_batches(shared.tokens, LOGITS_AT_ONCE // words, shared.first):
            with block_runner(model, replace(calibration, batches=[batch])) as runner:
                sums += _rises(runner, batch.tokens.to(processes.device), bank, items, precisions)
    kl, loss = processes.reduce(sums).cpu() / calibration.num_sequences
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
    """The rise of loss to first order, in nats per token; arguments and errors as for `measured_rises`.

    Returns:
        Rises of loss, [items, precisions] in float64, at least 0.
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


def _rises(
    runner: BlockRunner, tokens: Tensor, bank: Bank, items: Sequence[Item], precisions: Sequence[Precision]
) -> Tensor:
    """Sums of the mean rises of each sequence over the sequences of one micro-batch.

    The input of each block in the dense model is passed through the block with each of its items in each precision; the
    outputs are passed on through the following blocks, all of them through one block before the next.

    Returns:
        Rises of KL and of loss, [2, items, precisions] in float64.
    """
    (dense,) = runner.embed()
    changed: dict[tuple[int, int], Tensor] = {}  # hidden states of the changed models so far, by row and column
    for number in range(len(runner.blocks)):
        with runner.working(number):
            for cell, hidden in changed.items():
                changed[cell] = runner.keep(runner.call(number, 0, hidden))
            for row, item in enumerate(items):
                if item.layer != number:
                    continue
                names = item.linears(runner.model)
                for column, precision in enumerate(precisions):
                    bank.place_(runner.model, names, precision)
                    changed[row, column] = runner.keep(runner.call(number, 0, dense))
                bank.place_(runner.model, names, DENSE)
            dense = runner.keep(runner.call(number, 0, dense))
    reference = log_probabilities(runner, dense)
    sums = torch.zeros(2, len(items), len(precisions), dtype=torch.float64, device=tokens.device)
    for (row, column), hidden in changed.items():
        kl, rise = distances(runner, hidden, reference, tokens)
        # Means over each sequence, so that batches of any size add up to the mean over all sequences.
        sums[0, row, column] = kl.mean(1).sum()
        sums[1, row, column] = rise[:, :-1].mean(1).sum()
    return sums


def log_probabilities(runner: BlockRunner, hidden: Tensor) -> Tensor:
    """Log-probabilities of all words, given the output of the last block [B, T, H], in float32."""  # [B T, V]
    last = runner.last(hidden).flatten(0, 1)
    return torch.cat([_log_softmax(runner, last[part]) for part in runner.head.chunks(last)])


def _log_softmax(runner: BlockRunner, last: Tensor) -> Tensor:
    return F.log_softmax(runner.logits(last).float(), dim=-1)


def distances(runner: BlockRunner, hidden: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """KL to the model before a change at each position, and the rise of the loss of the token after it.

    Args:
        runner: runner on the changed model.
        hidden: hidden states that the last block of the changed model outputs, [B, T, H].
        reference: log-probabilities before the change, [B T, V].
        tokens: tokens of the text, [B, T].

    Returns:
        Two tensors [B, T] in float64; at the last position of a row, which predicts no token, the rise is meaningless.
    """
    last, targets = runner.last(hidden).flatten(0, 1), tokens.roll(-1, 1).flatten()
    kl, rise = (torch.empty(len(targets), dtype=torch.float64, device=tokens.device) for _ in range(2))
    for part in runner.head.chunks(last):
        after, before, target = _log_softmax(runner, last[part]), reference[part], targets[part, None]
        kl[part] = F.kl_div(after, before, log_target=True, reduction="none").sum(-1).double()
        rise[part] = (before.gather(1, target) - after.gather(1, target)).squeeze(1).double()
    return kl.view(tokens.shape), rise.view(tokens.shape)
