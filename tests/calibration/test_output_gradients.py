"""Weights of tokens by the gradient of the loss, against a plain backward pass through the whole model."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from support.calibration import calibration, in_processes
from support.families import random_tokens, tiny_model
from torch import Tensor

from qpruner.anatomy import unit_linears
from qpruner.calibration.output_gradients import output_weights
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError

S, T = 6, 20
TEXT = random_tokens(S, T)


def linears_of(model: Any) -> dict[str, Any]:
    names = [name for units in unit_linears(model) for names in units.values() for name in names]
    return {name: model.get_submodule(name) for name in names}


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_they_are_the_mean_squared_gradients_of_each_group_of_outputs(family: str, num_groups: int) -> None:
    model = tiny_model(family).requires_grad_(False)
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            outputs[name] = output
            output.retain_grad()

        return hook

    handles = [linear.register_forward_hook(remember(name)) for name, linear in linears_of(model).items()]
    embedded = model.get_input_embeddings()(TEXT).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    for handle in handles:
        handle.remove()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TEXT[:, 1:].flatten(), reduction="none")
    nll.view(S, T - 1).mean(1).sum().backward()
    for name, batches in output_weights(model, linears_of(model), calibration(2, TEXT), num_groups).items():
        gradient = outputs[name].grad
        assert gradient is not None and len(batches) == 3
        groups = [part.square().mean(-1) for part in gradient.tensor_split(num_groups, dim=-1)]
        expected = torch.stack([group / group.mean() for group in groups], dim=-1)
        torch.testing.assert_close(torch.cat(batches), expected, rtol=1e-3, atol=1e-3)


def test_two_processes_share_the_mean() -> None:
    model = tiny_model("llama").requires_grad_(False)

    def work(text: Calibration) -> dict[str, list[Tensor]]:
        mine = deepcopy(model)  # threads would see each other's passes by their hooks
        return output_weights(mine, linears_of(mine), text, 2)

    (alone,) = in_processes(1, 2, work, TEXT)
    first, second = in_processes(2, 2, work, TEXT)
    for name, batches in alone.items():
        shares = [first[name][0], second[name][0], first[name][1]]  # every second micro-batch is the second's
        for expected, share in zip(batches, shares, strict=True):
            torch.testing.assert_close(share, expected)


def test_more_groups_than_outputs_are_refused() -> None:
    model = tiny_model("llama").requires_grad_(False)
    with pytest.raises(UserError, match=r"64 outputs, too few for 65 groups.*Lower calibrated.output_groups"):
        output_weights(
            model, {"model.layers.0.mlp.down_proj": model.model.layers[0].mlp.down_proj}, calibration(2, TEXT), 65
        )
