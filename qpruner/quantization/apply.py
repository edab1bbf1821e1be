"""Quantizes a model to the precisions of a plan, and computes initial adapters that reduce the rounding error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from qpruner.adapters.loftq import LoftQResult, loftq
from qpruner.adapters.lora import LoRAConfig, is_target
from qpruner.anatomy import unit_linears
from qpruner.errors import UserError
from qpruner.offload import opened
from qpruner.plan import DENSE, CompressionPlan, Precision
from qpruner.quantization.embedding import quantize_tables_
from qpruner.quantization.formats import dequantize, format_for, quantize, rebuild
from qpruner.quantization.packed import PackedLinear

Factors = tuple[Tensor, Tensor]
"""Factors A [r, in] and B [out, r] of an adapter, float32."""


@dataclass(frozen=True)
class Quantized:
    """A quantized linear and the initial factors of its adapter.

    Args:
        packed: packed linear.
        factors: initial factors of the adapter, on the CPU; None where the adapter starts at zero.
    """

    packed: PackedLinear
    factors: Factors | None


@dataclass(frozen=True)
class LoftQSettings:
    """How the adapters of quantized linears are initialised by LoftQ (see `qpruner.adapters.loftq`).

    Args:
        rank: rank r of the adapters.
        scale: factor by which the forward pass multiplies ``B A``.
        targets: linears that get adapters, in the form of ``target_modules`` of `LoRAConfig`.
        num_iterations: number of iterations T of LoftQ, at least 1.
        seed: seed of the run.
    """

    rank: int
    scale: float
    targets: Sequence[str] | str
    num_iterations: int
    seed: int

    @classmethod
    def of(cls, lora: LoRAConfig, num_iterations: int, seed: int) -> Self | None:
        """The settings for a model's adapters; None if these start at zero: with 0 iterations, or if pooled."""
        if num_iterations == 0 or lora.pooled:
            return None
        return cls(lora.r, lora.alpha / lora.r, lora.target_modules, num_iterations, seed)


def linear_precisions(model: nn.Module, plan: CompressionPlan) -> dict[str, Precision]:
    """The precision of each linear of a model's layers, by name."""
    return {
        name: layer.precision[unit]
        for layer, units in zip(plan.layers, unit_linears(model), strict=True)
        for unit, names in units.items()
        for name in names
    }


def adapter_ranks(model: nn.Module, plan: CompressionPlan) -> dict[str, int | None]:
    """The rank that a plan sets for the adapter of each linear of a model's layers, by name; None where not set."""
    return {
        name: layer.rank
        for layer, units in zip(plan.layers, unit_linears(model), strict=True)
        for names in units.values()
        for name in names
    }


def starts_of(
    model: nn.Module, plan: CompressionPlan, settings: LoftQSettings | None
) -> dict[str, LoftQSettings | None]:
    """The initialisation of the adapter of each linear that a plan packs, by name of the linear.

    Args:
        model: model that the plan is for.
        plan: plan with the precision of each linear; it may also set the rank of a layer.
        settings: settings of LoftQ, whose rank applies to layers for which the plan sets none; None if adapters start
            at zero.
    """
    packed = [name for name, precision in linear_precisions(model, plan).items() if precision != DENSE]
    if settings is None:
        return dict.fromkeys(packed)
    ranks = adapter_ranks(model, plan)
    return {name: replace(settings, rank=ranks[name] or settings.rank) for name in packed}


def quantize_(
    model: Any,
    plan: CompressionPlan,
    settings: LoftQSettings | None,
    *,
    device: torch.device,
) -> dict[str, Factors]:
    """Replaces the linears and tables of a narrowed model by packed ones, one at a time, as its plan says.

    Args:
        model: model to quantize, in place.
        plan: plan whose widths the model has.
        settings: settings of LoftQ; None for quantization alone, after which adapters start at zero.
        device: device on which each linear is quantized; the results are on the model's device.

    Returns:
        Initial factors of the adapters, by the name of their linear; empty without ``settings``.

    Raises:
        UserError: no format offers a precision, an adapter's rank exceeds that of its linear, a weight that LoftQ
            approximates is not finite, or tied tables have different precisions.
    """
    precisions = linear_precisions(model, plan)
    starts = starts_of(model, plan, settings)
    check_rank(model, starts)
    quantize_tables_(model, plan.embedding, plan.head, device=device)
    factors: dict[str, Factors] = {}
    for name, start in starts.items():
        linear: Any = model.get_submodule(name)
        with opened(model, linear):
            quantized = quantize_linear(linear, precisions[name], name, start, device)
        if quantized.factors is not None:
            factors[name] = quantized.factors
        model.set_submodule(name, quantized.packed.to(next(model.parameters()).device).train(linear.training))
    return factors


def quantize_linear(
    linear: nn.Linear, precision: Precision, name: str, settings: LoftQSettings | None, device: torch.device
) -> Quantized:
    """Quantizes one linear on a device, and initialises its adapter if it gets one that does not start at zero."""
    if settings is None or not is_target(name, settings.targets):
        return Quantized(quantize(linear.to(device), precision), None)
    result = quantize_with_adapter(linear, precision, name, settings, device)
    return Quantized(result.quantized, (result.lora_A.cpu(), result.lora_B.cpu()))


def quantize_with_adapter(
    linear: nn.Linear, precision: Precision, name: str, settings: LoftQSettings, device: torch.device
) -> LoftQResult[PackedLinear]:
    """Quantizes one linear and initialises its adapter by LoftQ, on a device."""
    bias = None if linear.bias is None else linear.bias.detach().clone().to(device)

    def packed(weight: Tensor) -> PackedLinear:
        state = format_for(precision).encode(weight, precision)
        shape = linear.out_features, linear.in_features
        return rebuild(state, *shape, precision=precision, bias=bias, dtype=linear.weight.dtype)

    return loftq(
        linear.weight.detach().to(device),
        packed,
        dequantize,
        name=name,
        rank=settings.rank,
        scale=settings.scale,
        num_iterations=settings.num_iterations,
        seed=settings.seed,
    )


def check_rank(model: nn.Module, starts: Mapping[str, LoftQSettings | None]) -> None:
    """Makes sure that no adapter has a higher rank than its linear.

    Args:
        model: model that contains the linears.
        starts: initialisation of each linear's adapter, by name of the linear; None for an adapter that starts at zero.

    Raises:
        UserError: an adapter has a higher rank; the message names the narrowest such linear, and its highest rank.
    """
    too_high = {}
    for name, start in starts.items():
        linear: Any = model.get_submodule(name)
        highest = min(linear.in_features, linear.out_features)
        if start is not None and is_target(name, start.targets) and start.rank > highest:
            too_high[name] = start.rank, highest
    if too_high:
        name = min(too_high, key=lambda candidate: too_high[candidate][1])
        rank, highest = too_high[name]
        raise UserError(
            f"LoRA rank {rank} is above that of {name}, which is {highest}. Lower --model.lora.r to at most {highest}, "
            f"or the rank that a plan has for this layer, or prune less."
        )
