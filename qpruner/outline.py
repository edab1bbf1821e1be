"""The shapes of a model, from its configuration alone.

What only counts parameters and bytes needs no model that runs, and so not transformers' model classes either, whose
import takes twice as long as that of torch.
"""

from typing import Any

import torch
from torch import nn

from qpruner.anatomy import architecture_of, family_of


def outline_of(config: Any) -> nn.Module:
    """A model that cannot run, with the parameters of the one that can, by the same names, on the meta device.

    Args:
        config: of a causal language model; its layers may differ in width.

    Raises:
        UserError: an unsupported family.
    """
    _, family = family_of(config)
    widths = architecture_of(config)
    hidden, vocabulary, head_dim = widths.hidden_size, config.vocab_size, widths.head_dim
    biased = {name for name, switch in family.biases.items() if switch is None or getattr(config, switch)}
    model: Any = nn.Module()
    model.config = config
    table = torch.empty(vocabulary, hidden, device="meta")  # given to it: drawing one on meta imports a compiler
    _put(model, family.embedding, nn.Embedding(vocabulary, hidden, _weight=table))
    _put(model, family.layers, nn.ModuleList(nn.Module() for _ in range(widths.num_layers)))
    for number, (groups, channels) in enumerate(zip(widths.kv_groups, widths.ffn_channels, strict=True)):
        queries, keys = groups * widths.queries_per_group * head_dim, groups * head_dim
        shapes = {
            **{"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)},
            **{"gate": (hidden, channels), "up": (hidden, channels), "down": (channels, hidden)},
        }
        layer = f"{family.layers}.{number}"
        for name, (inputs, outputs) in shapes.items():
            linear = nn.Linear(inputs, outputs, bias=name in biased, device="meta")
            _put(model, f"{layer}.{family.projections[name]}", linear)
        for path in family.layer_norms:
            _put(model, f"{layer}.{path}", nn.RMSNorm(hidden, device="meta"))
        for path in family.head_norms:
            _put(model, f"{layer}.{path}", nn.RMSNorm(head_dim, device="meta"))
    _put(model, family.last_norm, nn.RMSNorm(hidden, device="meta"))
    _put(model, family.head, nn.Linear(hidden, vocabulary, bias=False, device="meta"))
    if config.tie_word_embeddings:
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    return model


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Gives a model a module at a dotted path, with empty ones above it."""
    *above, name = path.split(".")
    for part in above:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(name, module)
