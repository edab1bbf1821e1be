"""Cost of quantizing one item to fewer bits while all others are at random widths, too.

**Idea.** At few bits, the cost of an item depends on the widths of the others: alone in an otherwise dense model it is
lower, or higher, than in the model that a budget pays for. Each item is therefore measured inside random assignments
around the middle of what budgets can pay for, and its costs are averaged over these contexts (marginalised). They do
not depend on the budget: one pass serves all budgets.

**Formula.** With x_k, k = 1..K, random assignments of widths to the n items, L(x) the loss (or the KL divergence from
the dense model) of the model assembled according to x, x_k[i -> b] the assignment x_k with item i in precision b, and w
the widest of P precisions,

    cost(i, b) = 1/K sum_k d_k(i, b),    d_k(i, b) = L(x_k[i -> b]) - L(x_k[i -> w]),
    error(i, b) = std_k d_k(i, b) / sqrt(K).

This is the least-squares fit of an additive model with an intercept for each context and item; an additive loss is
recovered exactly from any contexts. Contexts come in pairs: x_k and its mirror, which has the b-th narrowest width
where x_k has the b-th widest. With two widths, each item then meets every other one in both, so interactions of two
items cancel, however strong: cost(i, b) is exactly the average over all 2^(n - 1) contexts if there are no interactions
of three. Within a context, widths are dealt by a random permutation in equal shares that shift with the level t,

    place(i) = clamp(floor(P (u_i + t - 1/2)), 0, P - 1),    u_i = (permutation(i) + 1/2) / n,

and the levels of all contexts are spread evenly from 1/4 to 3/4: with two widths, the share of wide items. The error
treats contexts as independent; where mirrors cancel, it is an overestimate.

**Cost.** For each context a forward pass, and for each item and each of the other P - 1 precisions one through the
item's block and those after it: K (1 + n (P - 1) / 2) forward passes where items are blocks, K / 2 times as many as
measuring P = 2 precisions of each item alone takes.

**Trade-off.** Least squares on the losses of independent draws, one full forward pass each, needs more draws than there
are costs before it says anything, and as many passes again before interactions of two items cancel; see
``benchmarks/block_estimators.py``. **Source.** Averaging sensitivities over random bits of the others is from MixQuant
(2026), of which only the abstract was available; that mirrored pairs free main effects of interactions of two is the
fold-over of factorial designs (Box and Wilson 1951).

Shapes: K contexts, n items, P precisions.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qpruner.allocation.items import Item
from qpruner.allocation.rises import distances, log_probabilities
from qpruner.calibration.blocks import BlockRunner, block_runner
from qpruner.calibration.text import Calibration, micro_batches
from qpruner.errors import UserError
from qpruner.likelihood import LOGITS_AT_ONCE, Head
from qpruner.plan import DENSE, Precision
from qpruner.quantization.bank import Bank
from qpruner.seeds import derive_seed


class MarginalRises(NamedTuple):
    """Costs of each item in each precision relative to the widest, in nats per token; each [n, P] in float64.

    Args:
        kl: rise of the KL divergence from the model without quantization.
        loss: rise of the loss.
        kl_error: standard error of ``kl`` over contexts.
        loss_error: standard error of ``loss`` over contexts.
    """

    kl: Tensor
    loss: Tensor
    kl_error: Tensor
    loss_error: Tensor

    def __str__(self) -> str:
        n = len(self.loss)
        values = [
            f"{name} {float(cost[:, 0].mean()):.4f} (standard error of one {float(error[:, 0].norm()) / n**0.5:.4f})"
            for name, cost, error in (("loss", self.loss, self.loss_error), ("KL", self.kl, self.kl_error))
        ]
        return (
            f"Going from the widest to the narrowest precision among others of random bits costs each of "
            f"{n} items on average, in nats per token: {'; '.join(values)}."
        )


def draw_contexts(num_items: int, num_precisions: int, num_contexts: int, seed: int) -> Tensor:
    """Assignments in which items are measured, as indices of precisions, narrowest first; deterministic.

    Args:
        num_items: number of items, n.
        num_precisions: number of precisions, P.
        num_contexts: number of assignments, K, which is even: the second half mirrors the first.
        seed: seed of the run.
    """  # [K, n] int64
    assert num_contexts >= 2 and num_contexts % 2 == 0
    pairs = num_contexts // 2
    generator = torch.Generator().manual_seed(derive_seed(seed, "allocation", "contexts"))
    ranks = torch.stack([torch.randperm(num_items, generator=generator) for _ in range(pairs)])
    levels = 0.25 + (torch.arange(pairs, dtype=torch.float64) + 0.5) / (4 * pairs)  # mirrors have 1 minus these levels
    shifted = (ranks + 0.5) / num_items + levels[:, None] - 0.5
    places = (num_precisions * shifted).floor().long().clamp(0, num_precisions - 1)
    return torch.cat([places, num_precisions - 1 - places])


def averaged(losses: Tensor) -> tuple[Tensor, Tensor]:
    """Costs relative to the widest precision, and their standard errors; each [n, P].

    Args:
        losses: losses of each context with one item in each precision, narrowest first, [K, n, P].
    """
    rises = losses - losses[..., -1:]
    return rises.mean(0), rises.std(0) / math.sqrt(len(losses))


@torch.no_grad()
def marginal_rises(
    model: Any,
    bank: Bank,
    items: Sequence[Item],
    precisions: Sequence[Precision],
    calibration: Calibration,
    *,
    num_contexts: int,
    seed: int,
) -> MarginalRises:
    """Costs of each item in each precision, averaged over random precisions of the others.

    Args:
        model: narrowed and dense model, on the device that computes; it is left unchanged.
        bank: bank that holds the items in the precisions.
        items: items to quantize; everything else stays dense.
        precisions: precisions that each item may have, narrowest first; dense may be among them.
        calibration: this process's share of the text.
        num_contexts: number of assignments in which each item is measured, even.
        seed: seed of the run, from which the assignments are drawn.

    Returns:
        Costs and their standard errors, the same in all processes.

    Raises:
        UserError: a loss is not finite.
    """
    processes = calibration.processes
    contexts = draw_contexts(len(items), len(precisions), num_contexts, seed).tolist()
    shape = 2, num_contexts, len(items), len(precisions)
    sums = torch.zeros(shape, dtype=torch.float64, device=processes.device)
    words: int = Head.of(model).linear.out_features  # type: ignore[assignment]
    for shared in calibration.batches:
        for batch in micro_batches(shared.tokens, LOGITS_AT_ONCE // words, shared.first):
            with block_runner(model, replace(calibration, batches=[batch])) as runner:
                sums += _losses(runner, batch.tokens.to(processes.device), bank, items, precisions, contexts)
    kl, loss = processes.reduce(sums).cpu() / calibration.num_sequences
    for number, item in enumerate(items):
        if not (kl[:, number].isfinite().all() and loss[:, number].isfinite().all()):
            raise UserError(
                f"The rise of KL or loss by quantizing {item} among others is not finite. Use --model.dtype float32, "
                f"another base model, or deciding.widths with more bits."
            )
    (kl, kl_error), (loss, loss_error) = averaged(kl), averaged(loss)
    return MarginalRises(kl, loss, kl_error, loss_error)


def _losses(
    runner: BlockRunner,
    tokens: Tensor,
    bank: Bank,
    items: Sequence[Item],
    precisions: Sequence[Precision],
    contexts: Sequence[Sequence[int]],
) -> Tensor:
    """Sums of KL and rise of loss, relative to the dense model, over the sequences of one micro-batch.

    The input of each block in a context is kept, so that for an item only its own block and those after it are run.

    Returns:
        KL and rise of loss with each item in each precision, [2, K, n, P] in float64.
    """
    names = [item.linears(runner.model) for item in items]

    def place(item: int, precision: Precision) -> None:
        bank.place_(runner.model, names[item], precision)

    def after(first: int, hidden: Tensor) -> Tensor:
        """KL and rise of loss, given the input of a block, [2]."""
        for number in range(first, len(runner.blocks)):
            hidden = runner.call(number, 0, hidden)
        kl, rise = distances(runner, hidden, reference, tokens)
        # Means over each sequence, so that batches of any size add up to the mean over all sequences.
        return torch.stack([kl.mean(1).sum(), rise[:, :-1].mean(1).sum()])

    (embedded,) = runner.embed()
    reference = log_probabilities(runner, _through(runner, embedded)[-1])
    shape = 2, len(contexts), len(items), len(precisions)
    sums = torch.zeros(shape, dtype=torch.float64, device=tokens.device)
    for number, context in enumerate(contexts):
        for item, column_of_item in enumerate(context):
            place(item, precisions[column_of_item])
        entering = _through(runner, embedded)
        of_context = after(len(runner.blocks), entering[-1])
        for item, column_of_item in enumerate(context):
            layer = items[item].layer
            for column, precision in enumerate(precisions):
                if column == column_of_item:
                    sums[:, number, item, column] = of_context
                else:
                    place(item, precision)
                    sums[:, number, item, column] = after(layer, entering[layer])
            place(item, precisions[column_of_item])
    for item in range(len(items)):
        place(item, DENSE)
    return sums


def _through(runner: BlockRunner, embedded: Tensor) -> list[Tensor]:
    """The input of each block, and the output of the last one."""  # [blocks + 1] of [B, T, H]
    states = [embedded]
    for number in range(len(runner.blocks)):
        states.append(runner.call(number, 0, states[-1]))
    return states
