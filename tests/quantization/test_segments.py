import copy
from pathlib import Path

import peft
import pytest
import torch
from support.families import adapted, logits_of, packed, tiny_model
from support.linears import quantize_dequantize, random_linear

from qpruner.adapters.lora import LoRAConfig, detach_adapters
from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.model_folder import load_base, save_base
from qpruner.plan import UNITS, CompressionPlan, Leading, Precision
from qpruner.pricing import average_bits, price
from qpruner.quantization.apply import quantize_
from qpruner.quantization.formats import dequantize, format_for, narrowed, num_bytes, quantize
from qpruner.quantization.merging import merge_

INT8 = Precision("int8", 8)
FINE = Precision("symmetric", 6)
COARSE = Precision("affine-double", 3, 32)
TWO = Precision("affine-double", 3, 32, Leading(20, FINE))
BLOCKS = Precision("nf4", 4, leading=Leading(20, INT8))


def test_each_segment_is_what_its_format_makes_of_its_columns() -> None:
    for precision in (TWO, BLOCKS):
        linear = random_linear(100, 33)
        first = quantize_dequantize(linear.weight[:, :20], precision.leading.precision)  # type: ignore[union-attr]
        rest = quantize_dequantize(linear.weight[:, 20:], precision.rest)
        assert torch.equal(dequantize(quantize(linear, precision)), torch.cat([first, rest], 1))


def test_bytes_are_those_of_both_segments() -> None:
    assert num_bytes(33, 100, TWO) == num_bytes(33, 20, FINE) + num_bytes(33, 80, COARSE)
    # 20 columns of 8 bits with a float32 scale a row, and 80 of 4 bits in blocks of 64 with one each.
    assert num_bytes(32, 100, BLOCKS) == 32 * 20 + 32 * 4 + 32 * 80 // 2 + 32 * 80 // 64 * 4


def test_the_leading_tensors_are_named_so() -> None:
    assert set(quantize(random_linear(64, 8), TWO).state_dict()) == {
        "leading_codes",
        "leading_scales",
        "codes",
        "largest_scale",
        "scale_codes",
        "zero_points",
        "bias",
    }


def test_more_columns_than_there_are_cannot_lead() -> None:
    with pytest.raises(
        UserError, match="^20 columns cannot lead in a linear that has 20. Give at most 19, or hold all"
    ):
        quantize(random_linear(20, 8), TWO)


def test_a_segment_that_no_format_offers_is_named() -> None:
    with pytest.raises(UserError, match="int8 has no 4 bits"):
        format_for(Precision("affine", 3, leading=Leading(4, Precision("int8", 4))))
    with pytest.raises(UserError, match="nf4 has no 3 bits"):
        format_for(Precision("nf4", 3, leading=Leading(4, INT8)))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([3, 0, *range(20, 52)], Precision("affine-double", 3, 32, Leading(2, FINE))),
        (list(range(52, 84)), COARSE),
        ([7, 19, 2], FINE),
    ],
)
def test_columns_are_taken_exactly(columns: list[int], expected: Precision) -> None:
    module = quantize(random_linear(100, 33), TWO)
    narrow = narrowed(module, 1, torch.tensor(columns))
    assert narrow.precision == expected
    assert torch.equal(dequantize(narrow), dequantize(module)[:, columns])
    taken = format_for(TWO).take(module.packed(), 1, torch.tensor(columns), 100, TWO)
    assert taken is not None and all(torch.equal(tensor, taken[name]) for name, tensor in narrow.packed().items())
    assert num_bytes(33, len(columns), expected) == sum(tensor.nbytes for tensor in narrow.packed().values())


def test_rows_are_taken_exactly_in_any_order() -> None:
    module = quantize(random_linear(100, 33), TWO)
    rows = [5, 2, 32]
    narrow = narrowed(module, 0, torch.tensor(rows))
    assert narrow.precision == TWO
    assert torch.equal(dequantize(narrow), dequantize(module)[rows])
    assert torch.equal(narrow.bias, module.bias[rows])


def test_what_cannot_be_taken_is_rounded_anew() -> None:
    module = quantize(random_linear(100, 33), TWO)
    for columns in ([30, 0, 31], [0, 21, 22, 60]):  # one that leads behind another; groups that run across
        narrow = narrowed(module, 1, torch.tensor(columns))
        assert narrow.precision == Precision("affine-double", 3, 32, Leading(1, FINE))
        weight = dequantize(module)[:, columns]
        assert torch.equal(dequantize(narrow), quantize_dequantize(weight, narrow.precision))


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    module = quantize(random_linear(100, 33), TWO)
    again = copy.deepcopy(module)
    x = torch.randn(3, 100)
    assert torch.equal(again(x), module(x))
    assert {t.data_ptr() for t in again.packed().values()}.isdisjoint(t.data_ptr() for t in module.packed().values())


def test_adapters_go_on_off_and_into_it() -> None:
    reference = packed(tiny_model("llama"), TWO)
    model = adapted(packed(tiny_model("llama"), TWO))
    with_adapters = logits_of(model)
    assert not torch.allclose(with_adapters, logits_of(reference), atol=1e-2)
    merged = merge_(copy.deepcopy(model), torch.float32)
    torch.testing.assert_close(logits_of(merged), with_adapters, rtol=1e-4, atol=1e-4)
    base, factors = detach_adapters(model)
    assert factors and torch.equal(logits_of(base), logits_of(reference))


def test_peft_merges_it_as_any_linear() -> None:
    model = packed(tiny_model("llama"), TWO)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    expected = logits_of(wrapped)
    torch.testing.assert_close(logits_of(wrapped.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_holds_the_bytes_that_were_priced_and_gives_the_same_model(tmp_path: Path) -> None:
    dense = CompressionPlan.dense(architecture_of(tiny_model("llama").config), None)
    units = {**dict.fromkeys(UNITS, TWO), "o": BLOCKS}
    plan = dense.with_precision([units] * len(dense.layers), embedding=BLOCKS, head=TWO)
    model = tiny_model("llama")
    quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(tmp_path / "model", model, plan, base_name="base", tokenizer=None)
    kept = load_base(tmp_path / "model")
    assert kept.plan == plan
    assert torch.equal(logits_of(kept.network), logits_of(model))
    cost = price(tiny_model("llama"), plan)
    stored = sum(tensor.nbytes for tensor in kept.network.state_dict().values())
    assert cost.total == stored
    assert average_bits(plan, 4) == pytest.approx(cost.average_bits)


def test_lora_of_a_config_starts_on_it() -> None:
    """PEFT dispatches by the class of a linear; that of two segments is one as any other."""
    model = adapted(packed(tiny_model("qwen2"), BLOCKS), target_modules=LoRAConfig().target_modules)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 3 * 7
