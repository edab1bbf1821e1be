"""Models pruned by packages of others, for `peers`: each function changes a Llama in place, all layers alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpruner.memory import num_parameters


def optipfair(model: Any, ratio: float, text: Tensor) -> Any:
    """FFN channels, by the default score of `optipfair`, as large a share as makes ``ratio`` of all parameters."""
    import optipfair as package

    share = ratio * num_parameters(model) / _ffn_parameters(model)
    return package.prune_model(model, pruning_percentage=100 * share, show_progress=False)


def torch_pruning(model: Any, ratio: float, text: Tensor) -> Any:
    """FFN channels, by the Taylor score of `torch-pruning`, as large a share as makes ``ratio`` of all parameters.

    The package's graph of an attention of this transformers release does not come to an end, and neither does that of
    the whole model; so its pruner is given each FFN, with gradients of the loss of the whole model. Heads stay.

    Args:
        model: model to prune.
        ratio: share of all parameters to remove.
        text: calibration tokens, [N, T].
    """
    import torch_pruning as package

    model.requires_grad_(True)
    for rows in torch.split(text, 8):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        (loss * len(rows) / len(text)).backward()
    share = ratio * num_parameters(model) / _ffn_parameters(model)
    entering = torch.zeros(1, 8, model.config.hidden_size, dtype=model.dtype)
    for layer in model.model.layers:
        package.pruner.MetaPruner(
            layer.mlp,
            example_inputs=entering,
            importance=package.importance.GroupTaylorImportance(),
            pruning_ratio=share,
            ignored_layers=[layer.mlp.down_proj],
        ).step()
    model.config.intermediate_size = model.model.layers[0].mlp.gate_proj.out_features
    model.zero_grad()
    return model


def _ffn_parameters(model: Any) -> int:
    return sum(num_parameters(layer.mlp) for layer in model.model.layers)


PEERS: dict[str, Callable[[Any, float, Tensor], Any]] = {"torch-pruning": torch_pruning, "optipfair": optipfair}
