"""A compressed model as exports read it: one dense tensor at a time, each computed on demand."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from qpruner.adapters.lora import Adapter, adapters_of, detach_adapters
from qpruner.anatomy import family_of
from qpruner.dense_copy import check_finite, model_folder
from qpruner.export.description import Description
from qpruner.model_folder import load_compressed, read_plan
from qpruner.quantization.embedding import PackedEmbedding
from qpruner.quantization.formats import dequantize
from qpruner.quantization.packed import PackedLinear


@dataclass(frozen=True)
class Source(Description):
    """A compressed model, and the dense model that it represents.

    Parameters have the names of the dense model in transformers, such as ``model.layers.0.self_attn.q_proj.weight``;
    weights are [out, in], those of GPT-2 too.

    Args:
        adapters: trained adapters by the name of their linear.
        network: packed base as a transformers model, frozen, in evaluation mode on the CPU, without adapters.
    """

    adapters: Mapping[str, Adapter]
    network: Any

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the folder of a run, or of its model.

        Raises:
            UserError: there is no such folder, its fit is unfinished, a file is missing or altered, or values are not
                finite.
        """
        folder = model_folder(folder.expanduser())
        model, plan = load_compressed(folder), read_plan(folder)
        check_finite(model, f"the model in {str(folder)!r}", "Train again with a lower --model.optimizer.lr.")
        if not hasattr(model, "peft_config"):
            return cls(folder, model.config, plan, {}, model)
        adapters, network = adapters_of(model), detach_adapters(model)[0].eval()
        return cls(folder, network.config, plan, adapters, network)

    @cached_property
    def dense_config(self) -> Any:
        """The configuration of the dense model, with tied embeddings where `tied` is true."""
        config = copy.deepcopy(self.config)
        config.tie_word_embeddings = self.tied
        return config

    def names(self) -> list[str]:
        """The parameters of the dense model, a tied head left out."""
        names = []
        for name, module in self.network.named_modules(remove_duplicate=False):
            if isinstance(module, PackedEmbedding):
                names.append(f"{name}.weight")
            elif isinstance(module, PackedLinear) and not name.endswith(".table"):
                names += [f"{name}.weight"] if module.bias is None else [f"{name}.weight", f"{name}.bias"]
            elif not isinstance(module, PackedLinear):
                names += [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        head = f"{family_of(self.config)[1].head}.weight"
        return [name for name in names if not (self.tied and name == head)]

    def packed(self, name: str) -> PackedLinear | None:
        """The packed linear or table with a module name; None where it is dense."""
        module: Any = self.network.get_submodule(name)
        module = module.table if isinstance(module, PackedEmbedding) else module
        return module if isinstance(module, PackedLinear) else None

    def weight(self, name: str) -> Tensor:
        """A parameter of the dense model, with its adapter where it has one; float32.

        Args:
            name: name of the parameter, as `names` gives it.
        """
        adapter = self.adapter(name)
        return self.base(name) if adapter is None else self.base(name) + adapter.product

    def base(self, name: str) -> Tensor:
        """A parameter of the dense model without its adapter; float32."""
        module, _, kind = name.rpartition(".")
        packed = self.packed(module) if kind == "weight" else None
        if packed is not None:
            return dequantize(packed)
        held: nn.Parameter = getattr(self.network.get_submodule(module), kind)
        return held.detach().float()

    def adapter(self, name: str) -> Adapter | None:
        """The adapter on a parameter; None where there is none."""
        module, _, kind = name.rpartition(".")
        return self.adapters.get(module) if kind == "weight" else None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter of the dense model, without computing it."""
        module, _, kind = name.rpartition(".")
        packed = self.packed(module) if kind == "weight" else None
        if packed is not None:
            return packed.out_features, packed.in_features
        held: nn.Parameter = getattr(self.network.get_submodule(module), kind)
        return tuple(held.shape)

    @cached_property
    def num_weights(self) -> int:
        """Number of weights in the dense model, biases and norms included."""
        return sum(torch.Size(self.shape(name)).numel() for name in self.names())
