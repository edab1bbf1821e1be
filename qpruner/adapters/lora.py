"""LoRA adapters on the projections of a decoder, using PEFT."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qpruner.errors import UserError, brief, check_ranges
from qpruner.seeds import derive_seed

ALL_LINEAR = "all-linear"
"""What stands in place of names for every linear except the language-model head and those of experts."""
OF_EXPERTS = r".*\.experts\.\d+\..*"
"""Names of the linears of experts, which get no adapters: there are hundreds, and each sees few tokens of a batch."""


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters ``W x + alpha / r * B A x``, with A drawn at random and B zero.

    Args:
        r: rank of the adapters, at least 1.
        alpha: scale of the adapters; their output is multiplied by ``alpha / r``.
        dropout: probability with which an input of the adapters is zeroed in training, in [0, 1).
        target_modules: linears that get adapters: the ends of their names, such as ``q_proj``; a regular expression
            for the whole name; or ``all-linear``, all except the language-model head. Names depend on the family:
            ``q_proj`` of a Llama is a part of ``qkv_proj`` in a Phi-3 and of ``c_attn`` in a GPT-2. The experts of a
            mixture get none.
        pooled: whether an adapter adds the same number to all weights of a group, so that `qpruner merge --packed`
            folds it into the group's minimum and the model stays packed (QA-LoRA). All linears with adapters are then
            held in the format ``affine``, and the adapters start from zero.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: Sequence[str] | str = ALL_LINEAR
    pooled: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, str):  # a list from YAML compares as a tuple
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        targets = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        if not targets or not all(target.strip() for target in targets):
            raise UserError(
                f"--model.lora.target_modules is {brief(self.target_modules)}, and so names nothing. Give the names of "
                f"linears as a list, such as [q_proj, v_proj], or {ALL_LINEAR}, which they are without the option."
            )
        if isinstance(self.target_modules, str) and not _is_pattern(self.target_modules):
            raise UserError(
                f"--model.lora.target_modules is {self.target_modules!r}, which is no regular expression. Give one, "
                f"the names of linears as a list, or {ALL_LINEAR}."
            )
        check_ranges(
            self,
            "lora",
            r=("at least 1", self.r >= 1),
            alpha=("above 0 and finite", 0 < self.alpha < math.inf),
            dropout=("at least 0 and below 1", 0 <= self.dropout < 1),
        )


def is_target(name: str, targets: Sequence[str] | str) -> bool:
    """Whether the linear of a decoder layer with this name gets an adapter, by the rules of PEFT.

    Args:
        name: name of the linear in the model.
        targets: linears that get adapters, as ``target_modules`` of `LoRAConfig`.
    """
    if re.fullmatch(OF_EXPERTS, name):
        return False
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def target_linears(model: Any, targets: Sequence[str] | str) -> list[str]:
    """The names of the linears of a model that get adapters.

    Raises:
        UserError: a target is the end of no linear's name, or a pattern matches no linear or something else.
    """
    tables = {id(module) for module in model.get_input_embeddings().modules()}  # a packed one holds a linear
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in tables and not re.fullmatch(OF_EXPERTS, name)
    ]
    head = model.get_output_embeddings()
    chosen = [name for name in linears if is_target(name, targets)]
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return [name for name in linears if model.get_submodule(name) is not head]
        missing = [] if chosen else [targets]
        names = [target for target in re.split(r"[\s,]+", targets) if target]
        if missing and names and all(any(is_target(name, [target]) for name in linears) for target in names):
            raise UserError(
                f"LoRA target {targets!r} is taken as a regular expression for the whole of a name, and matches none. "
                f"Give the ends of names as a list: [{', '.join(names)}]."
            )
        others = [name for name, _ in model.named_modules() if name not in linears and is_target(name, targets)]
        if others:
            raise UserError(
                f"LoRA target {targets} matches {others[0]}, which is no linear of a layer. Let the pattern match "
                f"linears alone, as {linears[0]}."
            )
    else:
        missing = sorted(target for target in targets if not any(is_target(name, [target]) for name in linears))
    if missing or not chosen:
        ends = {name.rpartition(".")[2] for name in linears}
        raise UserError(
            f"LoRA target(s) {', '.join(missing) or 'none'} match no linear of {type(model).__name__}, which has "
            f"{', '.join(sorted(ends))}. Name some of these in --model.lora.target_modules."
        )
    return chosen


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@dataclass(frozen=True)
class Adapter:
    """The adapter on a linear.

    Args:
        base: linear below the adapter.
        lora_A: factor A, [r, in].
        lora_B: factor B, [out, r].
        scale: factor by which the forward pass multiplies B A.
    """

    base: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float

    @property
    def product(self) -> torch.Tensor:
        """What the adapter adds to the weight of its linear; float32 [out, in]."""
        return self.scale * (self.lora_B.detach().float() @ self.lora_A.detach().float())


def adapter_on(linear: Any) -> Adapter | None:
    """The adapter on a linear of a PEFT model; None if there is none.

    Raises:
        UserError: the adapter is more than ``scale * B A``, as with DoRA, or has a bias.
    """
    if not hasattr(linear, "lora_A"):
        return None
    if linear.lora_variant or any(linear.lora_bias.values()):
        kinds = ", ".join(type(variant).__name__ for variant in linear.lora_variant.values()) or "LoRA with biases"
        raise UserError(
            f"An adapter of this model is of another kind than LoRA's two factors: {kinds}. Merge it by PEFT's "
            f"`merge_and_unload`, or train adapters of --model.lora."
        )
    return Adapter(
        linear.get_base_layer(),
        linear.lora_A["default"].weight,
        linear.lora_B["default"].weight,
        linear.scaling["default"],
    )


def attach_adapters(model: Any, config: LoRAConfig, *, seed: int, ranks: Mapping[str, int] | None = None) -> Any:
    """Wraps the model in PEFT adapters, which are the only parameters left to train, in float32.

    Args:
        model: model of transformers.
        config: rank, scale and targets of the adapters.
        seed: seed of the random initialisation of the adapters.
        ranks: rank of a linear's adapter if it differs from that of ``config``, by the name of the linear; its output
            is scaled like that of the others.

    Raises:
        UserError: as `target_linears`.
    """
    import peft

    targets, ranks = config.target_modules, ranks or {}
    names = target_linears(model, targets)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:  # to PEFT this is more if the embedding is packed
        targets = sorted({name.rpartition(".")[2] for name in names})
    has_experts = any(re.fullmatch(OF_EXPERTS, name) for name, _ in model.named_modules())
    lora = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): config.alpha / config.r * rank for name, rank in ranks.items()},
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=OF_EXPERTS if has_experts else None,
        task_type=peft.TaskType.CAUSAL_LM,
    )
    # Every process and every resumed run draws the same A, whatever was drawn before.
    naming = _of_unknown_type(model.config) if has_experts else nullcontext()
    with torch.random.fork_rng(devices=[]), naming:
        torch.manual_seed(derive_seed(seed, "adapters"))
        return peft.get_peft_model(model, lora)


@contextmanager
def _of_unknown_type(config: Any) -> Iterator[None]:
    """Hides the family from PEFT meanwhile, which would take all linears of its FFNs for those of fused experts."""
    config.model_type = f"qpruner_{config.model_type}"
    try:
        yield
    finally:
        del config.model_type


def set_factors_(model: Any, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Starts the adapters of some linears from given factors A [r, in] and B [out, r].

    Args:
        model: PEFT model whose adapters get the factors.
        factors: factors A [r, in] and B [out, r] by the name of the linear in the model below PEFT.
    """
    with torch.no_grad():
        for name, (lora_A, lora_B) in factors.items():
            layer = model.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(lora_A)
            layer.lora_B["default"].weight.copy_(lora_B)


def adapters_of(model: Any) -> dict[str, Adapter]:
    """Each adapter of a PEFT model by the name of its linear in the model below."""
    return {
        name: adapter
        for name, module in model.get_base_model().named_modules()
        if (adapter := adapter_on(module)) is not None
    }


def factors_of(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A [r, in] and B [out, r] of each adapter of a PEFT model by the name of its linear in the model below."""
    return {name: (adapter.lora_A.detach(), adapter.lora_B.detach()) for name, adapter in adapters_of(model).items()}


def detach_adapters(model: Any) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Takes the adapters off a PEFT model, without merging them.

    Returns:
        The model below, and its factors; see `factors_of`.
    """
    factors = factors_of(model)
    return model.unload(), factors
