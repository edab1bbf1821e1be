"""The tables of a model, token embedding and language-model head, held in a packed number format.

Tied ones stay one table: the head is the very module that the embedding reads its rows from, so whatever moves, copies
or counts modules treats both as one. Transformers is told of the tie in its own way, by ``_tied_weights_keys``; its
``tie_weights`` then finds nothing to do, and ``save_pretrained`` writes the table once, as the embedding's.
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
    """The embedding of a compressed folder, which can become dense again, and whose tied head may.

    Args:
        table: linear whose weight [vocabulary, hidden] is the table; with tied embeddings the head itself.
        dense: embedding that is replaced, with the rows of the table; its weight is let go.
    """

    def __init__(self, table: PackedLinear, dense: nn.Embedding) -> None:
        # Gemma's families multiply by the root of the hidden size, in the dtype of the weight.
        super().__init__(table, getattr(dense, "scalar_embed_scale", 1.0))
        dense.weight = None  # type: ignore[assignment]
        self._without_weight = (dense,)  # in a tuple, so that it is no part of the model

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., hidden]
        if isinstance(self.table, PackedLinear):
            return super().forward(ids)
        weight = self.table.weight  # since something wrote to the weight of a tied head
        return weight[ids] * torch.tensor(self.scale, dtype=weight.dtype)

    def unpacked_(self) -> nn.Embedding:
        """The embedding that it was made from, with the weight of the table, which is dense from now on."""
        embedding = copy.deepcopy(self._without_weight[0])
        embedding.weight = self.table.become_dense_().weight
        return embedding

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "table" and not isinstance(value, PackedLinear):  # PEFT puts its layers in place this way
            raise UserError(
                "A packed embedding takes no adapters. Name the linears of the layers as target modules, or leave the "
                "embedding dense in the plan."
            )
        super().__setattr__(name, value)


def table_precisions(config: Any, embedding: Precision, head: Precision) -> dict[str, Precision]:
    """The precision of each table of a model by the name of its module; a tied head is the embedding's table.

    Raises:
        UserError: an unsupported family, or two precisions for one table.
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
    """Replaces the dense embedding and head of a model by packed ones, where they are not to stay dense.

    Args:
        model: model that is changed in place.
        embedding: precision of the embedding.
        head: precision of the head.
        device: device on which each table is computed; the table stays where the model is.

    Raises:
        UserError: as `table_precisions`, or no format offers a precision.
    """
    home = next(model.parameters()).device

    def packed(name: str, dense: nn.Linear, precision: Precision) -> PackedLinear:
        return quantize(dense.to(device), precision).to(home)

    _replace_(model, table_precisions(model.config, embedding, head), packed)


def rebuild_tables_(model: Any, embedding: Precision, head: Precision, state: Mapping[str, Tensor]) -> None:
    """Puts packed tables from a state dict in the place of dense ones, whose weights are not read.

    Args:
        model: model that is changed in place; its dense tables may be on the meta device.
        embedding: precision of the embedding.
        head: precision of the head.
        state: state dict of the model that was saved; packed tables take its tensors over without a copy.

    Raises:
        UserError: as `quantize_tables_`, or the state lacks a tensor or has one of another shape.
    """

    def packed(name: str, dense: nn.Linear, precision: Precision) -> PackedLinear:
        return rebuild_linear(name, dense, precision, state)

    _replace_(model, table_precisions(model.config, embedding, head), packed)


def unpack_embedding_(model: Any) -> None:
    """Replaces a packed embedding by a dense one, and makes the head dense where that is the same table.

    Args:
        model: model that is changed in place; left alone where its embedding is dense.
    """
    _, family = family_of(model.config)
    packed = model.get_submodule(family.embedding)
    if isinstance(packed, PackedEmbedding):
        model.set_submodule(family.embedding, packed.unpacked_())
        if model.config.tie_word_embeddings:
            del model._tied_weights_keys  # that of the class holds again
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
