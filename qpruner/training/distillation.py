"""What a fit learns from the dense model: its distribution over the next token, and its last hidden states.

Shapes: N scored positions of a batch, n of them in a chunk, V tokens of the vocabulary, H hidden size, k tokens kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from qpruner.errors import UserError, check_ranges
from qpruner.likelihood import Head, Scored, losses_in_chunks, nll_of_logits
from qpruner.pretrained import DType

TeacherDType = Literal["auto", "float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class DistillationConfig:
    """Training on the predictions of the dense model, beside the labels.

    The loss of a scored token is ``cross_entropy * nll + logits * temperature^2 * KL + hidden * MSE``. KL is the
    divergence KL(teacher || student), both distributions taken at the temperature, whose square keeps the gradient
    about as large as at temperature 1; MSE is the mean squared difference of the last hidden states, the inputs of the
    head.

    ``online`` holds the dense model beside the student: exact, at the cost of the memory of a second model.
    ``recorded`` passes the rows that the fit will see through the teacher once, before anything is compressed, and
    stores its outputs in files under the run's folder, for later sessions and fits, too: training then needs no extra
    memory and no extra time, only disk space. Of each distribution it keeps the ``top_k`` most likely tokens, and the
    total probability of all others. Fits that see the same rows, such as those of whole epochs, share the files; a fit
    with another ``max_steps`` below an epoch sees other rows, and records them anew.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arXiv:1503.02531), section 2; hidden
    states: Lee et al., RILQ, 2024 (arXiv:2412.01129).

    Args:
        logits: weight of the divergence from the teacher's distribution, at least 0.
        hidden: weight of the mean squared error of the last hidden state, at least 0; needs a teacher of the student's
            hidden size.
        cross_entropy: weight of the negative log-likelihood of the labels, at least 0.
        temperature: divisor of the logits before the two distributions are compared, above 0.
        teacher: whether the teacher runs during training (``online``) or its outputs are ``recorded`` beforehand.
        base: teacher model, with the student's vocabulary; by default the dense model that the student was made from.
        dtype: number format of the teacher's weights: ``auto`` for that of the base, ``int8`` for linears in 8 bits.
        device: device on which the teacher runs, such as ``cuda:1``; by default that of the fit.
        top_k: number of tokens that ``recorded`` keeps of each distribution, at least 1.

    Raises:
        UserError: a value is out of its range, or both ``logits`` and ``hidden`` are 0.
    """

    logits: float = 1.0
    hidden: float = 0.0
    cross_entropy: float = 0.1
    temperature: float = 2.0
    teacher: Literal["online", "recorded"] = "online"
    base: str | None = None
    dtype: TeacherDType = "auto"
    device: str | None = None
    top_k: int = 64

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "distillation",
            logits=("at least 0 and finite", 0 <= self.logits < math.inf),
            hidden=("at least 0 and finite", 0 <= self.hidden < math.inf),
            cross_entropy=("at least 0 and finite", 0 <= self.cross_entropy < math.inf),
            temperature=("above 0 and finite", 0 < self.temperature < math.inf),
            top_k=("at least 1", self.top_k >= 1),
        )
        if self.logits == self.hidden == 0:
            raise UserError(
                "distillation.logits and distillation.hidden are both 0, and so nothing is learnt from the teacher. "
                "Give one of them a weight above 0, or leave distillation out."
            )
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise UserError(
                    f"distillation.device is {self.device!r}, which is no device. Give one such as 'cpu' or 'cuda:1', "
                    f"or leave it out for that of the fit."
                ) from error

    @property
    def logged(self) -> list[str]:
        """Names of the losses that are logged beside that of the labels."""
        return [name for name, weight in (("kl", self.logits), ("hidden", self.hidden)) if weight]

    def held_in(self, dtype_of_base: DType) -> DType:
        """The number format of the teacher's unpacked weights, by default that of the student's base.

        Args:
            dtype_of_base: number format that was requested for the student's base.
        """
        return dtype_of_base if self.dtype == "auto" or self.dtype == "int8" else self.dtype


@dataclass(frozen=True)
class Lesson:
    """A teacher's outputs at the N scored positions of a batch.

    Args:
        kl: function that computes the divergence of a chunk of positions, [n] in nats and at the temperature, from the
            student's logits [n, V] and the slice of positions that the chunk covers.
        hidden: [N, H], the teacher's last hidden states; None where they are not needed.
    """

    kl: Callable[[Tensor, slice], Tensor]
    hidden: Tensor | None

    def ordered(self, channels: Sequence[int]) -> Self:
        """The lesson for a student whose hidden channels are in another order, given as indices [H]."""
        return self if self.hidden is None else replace(self, hidden=self.hidden[:, list(channels)])


@dataclass(frozen=True)
class Losses:
    """Losses of the N scored positions of a batch.

    Args:
        total: [N], weighted sum that is trained on, with its gradient.
        parts: [N] each, unweighted and without a gradient: ``loss`` (negative log-likelihood), ``kl`` and ``hidden``;
            ``kl`` and ``hidden`` are missing where their weight is 0.
    """

    total: Tensor
    parts: dict[str, Tensor]


def distillation_losses(config: DistillationConfig, head: Head, scored: Scored, lesson: Lesson) -> Losses:
    """The student's losses against labels and teacher, a chunk of positions at a time.

    Args:
        config: weights of the losses.
        head: head of the student.
        scored: the student's last hidden states at the scored positions.
        lesson: the teacher's outputs at the same positions.
    """

    def losses(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        nll = nll_of_logits(logits, scored.targets[part])
        return (nll, lesson.kl(logits, part)) if config.logits else (nll,)

    weights = [config.cross_entropy, config.logits * config.temperature**2] if config.logits else [config.cross_entropy]
    total, values = losses_in_chunks(head, scored.hidden, losses, weights, heads=len(weights))
    parts = dict(zip(("loss", "kl"), values.unbind(-1), strict=False))
    if config.hidden:
        assert lesson.hidden is not None
        error = hidden_error(scored.hidden, lesson.hidden)
        total, parts["hidden"] = total + config.hidden * error, error.detach()
    return Losses(total, parts)


def hidden_error(hidden: Tensor, taught: Tensor) -> Tensor:
    """Mean squared difference of hidden states [N, H] from the teacher's."""  # [N] float32
    return (hidden.float() - taught.to(hidden.device).float()).square().mean(-1)


def forward_kl(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of distributions at a temperature, in nats.

    Args:
        logits: [n, V], logits of the student.
        taught: [n, V], logits of the teacher.
        temperature: divisor of both logits.
    """  # [n] float32
    learnt = F.log_softmax(logits.float() / temperature, dim=-1)
    return F.kl_div(learnt, F.log_softmax(taught.float() / temperature, dim=-1), log_target=True, reduction="none").sum(
        -1
    )


def likeliest(logits: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of a teacher, and the total probability of all others.

    Args:
        logits: [n, V], logits of the teacher.
        temperature: divisor of the logits.
        top_k: k, below V; with V - 1 the others are a single token, and nothing is lost.

    Returns:
        Log-probabilities of the tokens and, last, of all others together, [n, k + 1] float32; and the token ids,
            [n, k] int32.
    """
    scaled = logits.float() / temperature
    log_probabilities = F.log_softmax(scaled, dim=-1)
    words = log_probabilities.topk(top_k, dim=-1).indices
    others = log_probabilities.scatter(-1, words, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probabilities.gather(-1, words), others], dim=-1), words.int()


def truncated_kl(logits: Tensor, log_probabilities: Tensor, words: Tensor, temperature: float) -> Tensor:
    """`forward_kl` where the teacher keeps k tokens separate and lumps all others into one.

    It is smaller than the divergence over all tokens by the probability of the others times the divergence among them.

    Args:
        logits: [n, V], logits of the student.
        log_probabilities: [n, k + 1], the teacher's log-probabilities of the kept tokens and, last, of all others
            together; the probabilities are renormalized to sum to 1, to undo rounding.
        words: [n, k], ids of the kept tokens, fewer than V.
        temperature: divisor of the logits, the same as for the teacher's.
    """  # [n] float32
    scaled = logits.float() / temperature
    places = words.long()
    kept = scaled.gather(-1, places)
    others = scaled.scatter(-1, places, -math.inf).logsumexp(-1, keepdim=True)
    learnt = F.log_softmax(torch.cat([kept, others], dim=-1), dim=-1)
    taught = F.log_softmax(log_probabilities.float(), dim=-1)
    return F.kl_div(learnt, taught, log_target=True, reduction="none").sum(-1)
