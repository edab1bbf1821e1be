"""The tables of a model, token embedding and language-model head, in a packed number format.

Tied tables remain one: the head is the same module that the embedding reads its rows from, so code that moves, copies
or counts modules treats both as one. ``_tied_weights_keys`` declares the tie to transformers, whose ``tie_weights``
then finds nothing to do, and whose ``save_pretrained`` writes the table once, under the name of the embedding.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.anatomy import family_of
from qpruner.errors import UserError
from qpruner.modeling_compressed import CompressedEmbedding, tie_
from qpruner.plan import DENSE, Precision
from qpruner.quantization.formats import quantize
from qpruner.quantization.model import rebuild_linear
from qpruner.quantization.packed import PackedLinear


class PackedEmbedding(CompressedEmbedding):
    """A `CompressedEmbedding` that can become dense again; so can a head that is tied to it.

    Args:
        table: linear whose weight [vocabulary, hidden] is the table; with tied embeddings, the head itself.
        dense: embedding that is replaced; its weight is released.
    """

    def __init__(self, table: PackedLinear, dense: nn.Embedding) -> None:
        # Gemma's families multiply by the root of the hidden size, in the dtype of the weight.
        super().__init__(table, getattr(dense, "scalar_embed_scale", 1.0))
        dense.weight = None  # type: ignore[assignment]
        self._without_weight = (dense,)  # the tuple keeps it from becoming a submodule

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., hidden]
        if isinstance(self.table, PackedLinear):
            return super().forward(ids)
        weight = self.table.weight  # dense since something wrote to the tied head
        return weight[ids] * torch.tensor(self.scale, dtype=weight.dtype)

    def unpacked_(self) -> nn.Embedding:
        """The dense embedding that was replaced, with the weight of the table, which becomes dense for good."""
        embedding = copy.deepcopy(self._without_weight[0])
        embedding.weight = self.table.become_dense_().weight
        return embedding

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "table" and not isinstance(value, PackedLinear):  # how PEFT inserts its layers
            raise UserError(
                "A packed embedding takes no adapters. Name the linears of the layers as target modules, or leave the "
                "embedding dense in the plan."
            )
        super().__setattr__(name, value)


def table_precisions(config: Any, embedding: Precision, head: Precision) -> dict[str, Precision]:
    """The precision of each table of a model, by name of its module; a tied head is part of the embedding's entry.

    Args:
        config: configuration of the model.
        embedding: precision of the embedding.
        head: precision of the head.

    Raises:
        UserError: an unsupported family, or two precisions for a tied table.
    """
    _, family = family_of(config)
    if not config.tie_word_embeddings:
        return {family.embedding: embedding, family.head: head}
    if embedding != head:
        raise UserError(
            f"The head of this model is its embedding (tie_word_embeddings), and the plan holds the embedding in "
            f"{embedding} and the head in {head}. Give both the same precision."
        )
    return {family.embedding: embedding}


def quantize_tables_(model: Any, embedding: Precision, head: Precision, *, device: torch.device) -> None:
    """Replaces the dense embedding and head of a model by packed ones, except where their precision is dense.

    Args:
        model: model that is changed in place.
        embedding: precision of the embedding.
        head: precision of the head.
        device: device on which each table is quantized; the result is on the model's device.

    Raises:
        UserError: as `table_precisions`, or no format offers a precision.
    """
    home = next(model.parameters()).device

    def packed(name: str, dense: nn.Linear, precision: Precision) -> PackedLinear:
        return quantize(dense.to(device), precision).to(home)

    _replace_(model, table_precisions(model.config, embedding, head), packed)


def rebuild_tables_(model: Any, embedding: Precision, head: Precision, state: Mapping[str, Tensor]) -> None:
    """Replaces the dense embedding and head of a model by packed ones from a state dict; reads no dense weights.

    Args:
        model: model that is changed in place; its dense tables may be on the meta device.
        embedding: precision of the embedding.
        head: precision of the head.
        state: state dict of the saved model; packed tables use its tensors without copying them.

    Raises:
        UserError: as `quantize_tables_`, or the state lacks a tensor or has one of another shape.
    """

    def packed(name: str, dense: nn.Linear, precision: Precision) -> PackedLinear:
        return rebuild_linear(name, dense, precision, state)

    _replace_(model, table_precisions(model.config, embedding, head), packed)


def unpack_embedding_(model: Any) -> None:
    """Replaces a packed embedding by a dense one, and makes a head that is tied to it dense as well.

    Args:
        model: model that is changed in place; left unchanged if its embedding is dense.
    """
    _, family = family_of(model.config)
    packed = model.get_submodule(family.embedding)
    if isinstance(packed, PackedEmbedding):
        model.set_submodule(family.embedding, packed.unpacked_())
        if model.config.tie_word_embeddings:
            del model._tied_weights_keys  # the declaration of its class applies again
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys()


def _replace_(
    model: Any,
    precisions: Mapping[str, Precision],
    packed: Callable[[str, nn.Linear, Precision], PackedLinear],
) -> None:
    _, family = family_of(model.config)
    for name, precision in precisions.items():
        if precision == DENSE:
            continue
        dense = model.get_submodule(name)
        if name == family.head:
            model.set_submodule(name, packed(name, dense, precision))
            continue
        table = packed(f"{name}.table", _as_linear(dense), precision)
        model.set_submodule(name, PackedEmbedding(table, dense))
        tie_(model)


def _as_linear(embedding: nn.Embedding) -> nn.Linear:
    """The linear whose weight is the table of an embedding."""
    linear = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    linear.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)
    return linear.train(embedding.training)
