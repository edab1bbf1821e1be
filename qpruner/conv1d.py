"""GPT-2's ``Conv1D``, a linear whose weight is stored as [in, out], as the linear that it is.

Code that works on linears, formats and adapters included, then needs no special case. The state dict keeps the names
and shapes of transformers, so that weights that are dense when saved load there, too.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def conv1d_to_linear_(model: Any) -> Any:
    """Replaces every ``Conv1D`` of a model by an ``nn.Linear``, in place, and returns the model.

    The linear's weight [out, in] has the values, dtype and device of the old one, transposed. In the model's state
    dict, and in one that it loads, such weights lie as [in, out] while they are dense; packed ones lie as in any
    linear.

    Args:
        model: model of transformers; left alone where it has no Conv1D.
    """
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name in names:
        conv = model.get_submodule(name)
        linear = nn.Linear(conv.nx, conv.nf, device="meta")
        linear.weight = _transposed(conv.weight)
        linear.bias = conv.bias
        model.set_submodule(name, linear.train(conv.training))
    if names:
        transpose = _Transposed(names)
        model.register_state_dict_post_hook(transpose)
        model.register_load_state_dict_pre_hook(transpose)
    return model


def _transposed(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)


class _Transposed:
    """A hook that turns the dense weights of some linears in a state dict, after it is made or before it is loaded.

    Args:
        names: names of the linears.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        for name in self.names:
            key = f"{prefix}{name}.weight"
            if (weight := state.get(key)) is not None and weight.ndim == 2:
                state[key] = weight.T.contiguous()
