"""What gets one width together, and its bytes."""

from typing import Any

import pytest
from support.families import LAYERS, tiny_model

from qpruner.allocation.items import Item, items_of
from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS, Precision
from qpruner.quantization.formats import num_bytes

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)


def test_blocks_and_units_in_order() -> None:
    assert items_of(2, "block", ()) == [Item(0, UNITS), Item(1, UNITS)]
    assert items_of(2, "unit", ()) == [Item(layer, (unit,)) for layer in (0, 1) for unit in UNITS]
    assert [str(item) for item in (Item(3, UNITS), Item(0, ("o",)), Item(1, ("qkv", "o")))] == [
        "layer 3", "layer 0 o", "layer 1 qkv+o",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("alone", "left"),
    [
        ((), [0, 1, 2, 3]),
        ((0,), [1, 2, 3]),
        ((-1, 0), [1, 2]),
        ((1, -3), [0, 2, 3]),
        ((-4,), [1, 2, 3]),
        ((0, -4, 1, 2), [3]),
    ],
)
@pytest.mark.parametrize("granularity", ["block", "unit"])
def test_layers_that_are_left_alone_are_no_items(alone: Any, left: list[int], granularity: Any) -> None:
    found = items_of(4, granularity, alone)
    assert [item.layer for item in found] == [
        layer for layer in left for _ in range(1 if granularity == "block" else 4)
    ]


@pytest.mark.parametrize(
    ("alone", "said"),
    [
        ((4,), "leave_alone names 4; the model has layers 0 to 3"),
        ((0, -5, 9), "leave_alone names -5, 9; the model has layers 0 to 3"),
        ((0, 1, 2, 3), "names every layer, so that there are no bits to decide"),
        ((0, 1, -1, -2), "names every layer"),
    ],
)
def test_layers_that_are_not_there_and_all_of_them_are_refused(alone: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        items_of(4, "block", alone)


def test_linears_and_bytes_of_a_unit_are_those_of_its_projections() -> None:
    model = tiny_model("qwen2")
    widths = architecture_of(model.config)
    item = Item(1, ("qkv", "down"))
    names = [f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")]
    assert item.linears(model) == names
    assert len(Item(2, UNITS).linears(model)) == 7
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    for precision in (NF4, INT8):
        assert item.num_bytes(widths, precision, 2) == sum(num_bytes(*shape, precision) for shape in shapes)
    assert item.num_bytes(widths, DENSE, 2) == sum(2 * rows * columns for rows, columns in shapes)
    assert sum(one.num_bytes(widths, NF4, 4) for one in items_of(LAYERS, "unit", ())) == sum(
        one.num_bytes(widths, NF4, 4) for one in items_of(LAYERS, "block", ())
    )
