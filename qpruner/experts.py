"""Mixtures of experts as linears, each of which can be narrowed and packed by itself.

Transformers holds all experts of a layer in one tensor for each projection. Here they are lists of linears, so that
code which works on linears needs no special case. As long as all layers are dense and equal, tensors on disk have the
names and shapes of the family's published files, so that other tools read them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy.families import COMPRESSED, FAMILIES, Mixture
from qpruner.modeling_compressed import Experts

FUSED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""The tensors of gpt-oss's experts, in its files too: weights [E, in, out], of which gate and up take turns; biases."""


def experts_to_linears_(model: Any) -> Any:
    """Replaces every transformers module of fused experts by a list of experts, and returns the model.

    Args:
        model: model of transformers, on any device, also meta; left alone where it has no experts that are known.
    """
    family = FAMILIES.get(str(model.config.model_type).removeprefix(COMPRESSED))
    if family is None or (mixture := family.mixture) is None:
        return model
    ends = f".{mixture.path}"
    names = [name for name, module in model.named_modules() if name.endswith(ends) and not isinstance(module, Experts)]
    for name in names:
        fused: Any = model.get_submodule(name)
        with torch.device("meta"):
            experts = Experts.of(fused, mixture.names)
        for key, weight in _unfused(dict(fused.named_parameters()), mixture):
            owner, _, parameter = key.rpartition(".")
            setattr(experts.get_submodule(owner), parameter, nn.Parameter(weight, fused.down_proj.requires_grad))
        model.set_submodule(name, experts.train(fused.training))
    if names:
        fuses = hasattr(fused, "gate_up_proj_bias")
        model.register_state_dict_post_hook(_Writing(mixture, fuses))
        model.register_load_state_dict_pre_hook(_Reading(mixture, fuses))
        model._weight_conversions = []  # transformers' own, which would look for its fused tensors
    return model


def _unfused(fused: dict[str, Tensor], mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """The tensors of each expert, copied, by their names in the list.

    Args:
        fused: tensors of transformers' module by name.
        mixture: names of an expert's linears.
    """
    gate, up, down = mixture.names
    biased = "gate_up_proj_bias" in fused
    for number, (both, back) in enumerate(zip(fused["gate_up_proj"], fused["down_proj"], strict=True)):
        if biased:
            of_gate, of_up, of_down = both[:, ::2].T, both[:, 1::2].T, back.T
            biases = fused["gate_up_proj_bias"][number]
            for name, bias in ((gate, biases[::2]), (up, biases[1::2]), (down, fused["down_proj_bias"][number])):
                yield f"{number}.{name}.bias", _copied(bias)
        else:
            of_gate, of_up = both.chunk(2)
            of_down = back
        for name, weight in ((gate, of_gate), (up, of_up), (down, of_down)):
            yield f"{number}.{name}.weight", _copied(weight)


def _copied(part: Tensor) -> Tensor:
    return part.detach().clone(memory_format=torch.contiguous_format)


class _Writing:
    """A hook that gives a state dict the names and shapes of published files, if transformers' class can load it.

    That is the case where all layers are equal and dense.

    Args:
        mixture: where the experts are.
        fuses: whether the experts of a layer lie in one tensor in files, as those of gpt-oss.
    """

    def __init__(self, mixture: Mixture, fuses: bool) -> None:
        self.mixture, self.fuses = mixture, fuses

    def __call__(self, module: Any, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if module.config.is_heterogeneous or any(key.endswith("codes") for key in state):
            return
        if self.fuses:
            for before, entries in self._layers(state, prefix).items():
                for key in entries:
                    del state[f"{before}{key}"]
                state.update({f"{before}{key}": tensor for key, tensor in _fused(entries, self.mixture)})
        if self.mixture.stored_path is not None:
            _rename(state, self.mixture.block, self.mixture.stored_path)

    def _layers(self, state: dict[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
        """The tensors of each layer's experts, by what their names begin with and by the rest of these."""
        layers: dict[str, dict[str, Tensor]] = {}
        middle = f".{self.mixture.path}."
        for key, tensor in state.items():
            before, of_experts, rest = key.partition(middle)
            if of_experts and key.startswith(prefix):
                layers.setdefault(before + middle, {})[rest] = tensor
        return layers


class _Reading:
    """A hook that reverts what `_Writing` did to a state dict, and leaves others unchanged.

    Args:
        mixture: where the experts are.
        fuses: whether the experts of a layer lie in one tensor in files, as those of gpt-oss.
    """

    def __init__(self, mixture: Mixture, fuses: bool) -> None:
        self.mixture, self.fuses = mixture, fuses

    def __call__(self, module: Any, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if self.mixture.stored_path is not None:
            _rename(state, self.mixture.stored_path, self.mixture.block)
        if not self.fuses:
            return
        for key in [key for key in state if key.endswith(f"{self.mixture.path}.down_proj")]:
            before = key.removesuffix("down_proj")
            fused = {name: state.pop(f"{before}{name}") for name in FUSED}
            state.update({f"{before}{name}": tensor for name, tensor in _unfused(fused, self.mixture)})


def _rename(state: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in state if f".{old}." in key]:
        state[key.replace(f".{old}.", f".{new}.")] = state.pop(key)


def _fused(entries: dict[str, Tensor], mixture: Mixture) -> Iterator[tuple[str, Tensor]]:
    """What `_unfused` takes apart, of experts with biases."""
    number = 1 + max(int(key.partition(".")[0]) for key in entries)

    def stacked(name: str, kind: str) -> Tensor:
        return torch.stack([entries[f"{expert}.{name}.{kind}"] for expert in range(number)])

    gate, up, down = mixture.names
    both = torch.stack([stacked(gate, "weight"), stacked(up, "weight")], dim=2).flatten(1, 2)  # rows take turns
    yield "gate_up_proj", both.mT.contiguous()
    yield "gate_up_proj_bias", torch.stack([stacked(gate, "bias"), stacked(up, "bias")], dim=2).flatten(1)
    yield "down_proj", stacked(down, "weight").mT.contiguous()
    yield "down_proj_bias", stacked(down, "bias")
