"""Sums over tokens of products of activations, a few channels at a time: nothing beside the sums is as large."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHANNELS_AT_ONCE = 1024


def add_products_(total: Tensor, left: Tensor, right: Tensor, roots: Tensor | None = None) -> None:
    """Adds X^T D Y; products are taken in float32.

    Args:
        total: sum, [I, O]; float64.
        left: X, [N, I]; N tokens.
        right: Y, [N, O].
        roots: square roots of how much each token counts, [N, 1] in float32; None where all count the same.
    """
    for rows, of_rows in pieces(left, roots):
        for columns, of_columns in pieces(right, roots):
            total[rows, columns] += of_rows.T @ of_columns


def add_gram_(total: Tensor, values: Tensor, roots: Tensor | None = None) -> None:
    """Adds X^T D X; of two blocks on either side of the diagonal one is computed. See `add_products_`."""
    for rows, of_rows in pieces(values, roots):
        for columns, of_columns in pieces(values[:, : rows.stop], roots):
            products = of_rows.T @ of_columns
            total[rows, columns] += products
            if columns != rows:
                total[columns, rows] += products.T


def pieces(values: Tensor, roots: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """A few channels at a time, each token by its root, in float32."""
    for start in range(0, values.shape[1], CHANNELS_AT_ONCE):
        channels = slice(start, min(start + CHANNELS_AT_ONCE, values.shape[1]))
        piece = values[:, channels]
        yield channels, (piece if roots is None else piece * roots).to(torch.float32)
