"""The shapes of a model, from its configuration alone.

Counting parameters and bytes needs no model that can run. An outline therefore does without transformers' model
classes, which take twice as long to import as torch.
"""

from typing import Any

import torch
from torch import nn

from qpruner.anatomy import architecture_of, family_of, unit_paths, unit_shapes
from qpruner.anatomy.layers import MEMBERS


def outline_of(config: Any) -> nn.Module:
    """A model that cannot run, but has the same parameters under the same names as the real one, on the meta device.

    Args:
        config: configuration of a causal language model, whose layers may differ in width.

    Raises:
        UserError: an unsupported family.
    """
    _, family = family_of(config)
    widths = architecture_of(config)
    hidden, vocabulary, head_dim = widths.hidden_size, config.vocab_size, widths.head_dim
    biased = {name for name, switch in family.biases.items() if switch is None or getattr(config, switch)}
    model: Any = nn.Module()
    model.config = config

    def norm() -> nn.Module:
        return nn.LayerNorm(hidden, device="meta") if family.norm == "LayerNorm" else _rms_norm(hidden)

    _put(model, family.embedding, _table(vocabulary, hidden))
    if family.positions is not None:
        _put(model, family.positions, _table(config.max_position_embeddings, hidden))
    _put(model, family.layers, nn.ModuleList(nn.Module() for _ in range(widths.num_layers)))
    for number, groups in enumerate(widths.kv_groups):
        layer = f"{family.layers}.{number}"
        experts = widths.num_experts(number)
        shapes, paths = unit_shapes(widths, number), unit_paths(family, experts)
        if experts and family.mixture is not None:
            router = nn.Linear(hidden, experts, bias=family.mixture.biased_router, device="meta")
            _put(model, f"{layer}.{family.mixture.router}", router)
            _put(model, f"{layer}.{family.mixture.path}", nn.ModuleList(nn.Module() for _ in range(experts)))
        for unit, names in MEMBERS.items():
            has_bias = names[-1] in biased  # of gate and up, the latter, since gate may be missing
            for path, (outputs, inputs) in zip(paths[unit], shapes[unit], strict=True):
                _put(model, f"{layer}.{path}", nn.Linear(inputs, outputs, bias=has_bias, device="meta"))
        for path in family.head_entries:
            owner, _, name = path.rpartition(".")
            entries = nn.Parameter(torch.empty(groups * widths.queries_per_group, device="meta"))
            model.get_submodule(f"{layer}.{owner}").register_parameter(name, entries)
        for path in family.layer_norms:
            _put(model, f"{layer}.{path}", norm())
        for path in family.head_norms:
            _put(model, f"{layer}.{path}", _rms_norm(head_dim))
        for name, path in family.wide_norms.items():
            heads = groups * (widths.queries_per_group if name == "q" else 1)
            _put(model, f"{layer}.{path}", _rms_norm(heads * head_dim))
    _put(model, family.last_norm, norm())
    _put(model, family.head, nn.Linear(hidden, vocabulary, bias=False, device="meta"))
    if config.tie_word_embeddings:
        model.get_submodule(family.head).weight = model.get_submodule(family.embedding).weight
    return model


def _table(rows: int, columns: int) -> nn.Embedding:
    # The weight is passed in, since initialising one on the meta device would import a compiler.
    return nn.Embedding(rows, columns, _weight=torch.empty(rows, columns, device="meta"))


def _rms_norm(channels: int) -> nn.RMSNorm:
    return nn.RMSNorm(channels, device="meta")


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Adds a module to a model at a dotted path, and creates empty parent modules where they are missing."""
    *above, name = path.split(".")
    for part in above:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(name, module)
