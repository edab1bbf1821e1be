import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.linears import PRECISIONS, Chain, lora_gradients, quantize_dequantize, random_linear, with_lora
from torch import Tensor, nn

from qpruner.errors import UserError
from qpruner.plan import DENSE, Precision
from qpruner.quantization.formats import (
    FORMATS,
    dequantize,
    format_for,
    layout_of,
    num_bytes,
    quantize,
    rebuild,
)


def dense(module: nn.Module) -> nn.Linear:
    """The linear that holds the dequantized weight."""
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight.data = dequantize(module)
    linear.bias.data = module.bias.data.clone()
    return linear


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_every_format_is_tested() -> None:
    assert {precision.format for precision in PRECISIONS} == {number_format.name for number_format in FORMATS}


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(PRECISIONS),
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_bytes_are_known_before_the_work(precision: Precision, out: int, width: int, dtype: torch.dtype) -> None:
    assume(precision.leading is None or precision.leading.columns < width)
    state = quantize(random_linear(width, out, dtype), precision).packed()
    assert num_bytes(out, width, precision) == sum(tensor.nbytes for tensor in state.values())
    layout = layout_of(out, width, precision)
    assert {name: (t.dtype, t.shape) for name, t in layout.items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }


def test_bytes_by_hand() -> None:
    weights = 4096 * 4096
    assert num_bytes(4096, 4096, Precision("nf4", 4)) == weights // 2 + weights // 64 * 4
    double = weights // 2 + weights // 64 + weights // 64 // 256 * 4 + 4
    assert num_bytes(4096, 4096, Precision("nf4-double", 4)) == double
    assert num_bytes(4096, 4096, Precision("int8", 8)) == weights + 4096 * 4
    assert num_bytes(3, 43, Precision("nf4", 4)) == 65 + 3 * 4  # 129 weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_linear_is_frozen_and_keeps_bias_mode_and_random_state(
    precision: Precision, dtype: torch.dtype, bias: bool
) -> None:
    linear = nn.Linear(172, 33, bias=bias, dtype=dtype).eval()
    before = torch.random.get_rng_state()
    module = quantize(linear, precision)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training and module.precision == precision
    assert (module.in_features, module.out_features) == (172, 33)
    if bias:
        assert torch.equal(module.bias, linear.bias) and module.bias.dtype == dtype
        assert module.bias.data_ptr() != linear.bias.data_ptr()
    else:
        assert module.bias is None


@pytest.mark.parametrize("shape", [(33, 172), (5, 1377)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rebuilt_is_the_same_bit_for_bit(precision: Precision, shape: tuple[int, int], dtype: torch.dtype) -> None:
    module = quantize(random_linear(shape[1], shape[0], dtype), precision)
    x = torch.randn(3, shape[1], dtype=dtype)
    module(x)  # a used module has the same state
    bias = module.bias.data.clone()
    again = rebuild(copy.deepcopy(module.packed()), *shape, precision=precision, bias=bias, dtype=dtype)
    assert equal(module.packed(), again.packed())
    assert torch.equal(dequantize(module), dequantize(again))
    assert torch.equal(module(x), again(x))
    with torch.no_grad():
        assert torch.equal(module.eval()(x), again.eval()(x))


def test_forward_and_gradients_are_those_of_the_dequantized_weight(precision: Precision) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        first, second = (quantize(random_linear(*size, dtype), precision) for size in ((64, 96), (96, 37)))
        packed = with_lora(Chain(first, second))
        plain = with_lora(Chain(dense(first).to(dtype), dense(second).to(dtype)))
        x = torch.randn(5, 64, dtype=dtype)
        assert (packed(x) - plain(x)).norm() <= tolerance * plain(x).norm()
        gradients, expected = lora_gradients(packed, x), lora_gradients(plain, x)
        assert len(gradients) == 4
        for (name, gradient), reference in zip(gradients.items(), expected.values(), strict=True):
            assert gradient.shape == reference.shape
            assert (gradient - reference).norm() <= tolerance * reference.norm(), name


def test_inputs_may_have_any_dtype(precision: Precision) -> None:
    module = quantize(random_linear(64, 33), precision)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(2, 64, dtype=dtype)
        expected = nn.functional.linear(x, dequantize(module).to(dtype), module.bias.to(dtype))
        assert module(x).dtype == dtype
        torch.testing.assert_close(module(x), expected, rtol=1e-6, atol=1e-6)


def test_a_dense_linear_of_another_weight_has_other_gradients(precision: Precision) -> None:
    """The tolerance above is well below what quantization itself changes."""
    linears = random_linear(64, 96), random_linear(96, 37)
    x = torch.randn(5, 64)
    packed = lora_gradients(with_lora(Chain(*(quantize(linear, precision) for linear in linears))), x)
    unquantized = lora_gradients(with_lora(Chain(*linears)), x)
    for gradient, other in zip(packed.values(), unquantized.values(), strict=True):
        assert (gradient - other).norm() > 1e-4 * other.norm()


def test_gradients_under_autocast_are_those_of_the_dequantized_weight(precision: Precision) -> None:
    first, second = quantize(random_linear(64, 96), precision), quantize(random_linear(96, 37), precision)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        packed = lora_gradients(with_lora(Chain(first, second)), x)
        plain = lora_gradients(with_lora(Chain(dense(first), dense(second))), x)
    for gradient, reference in zip(packed.values(), plain.values(), strict=True):
        assert (gradient - reference).norm() <= 1e-2 * reference.norm()


def test_a_bias_that_trains_has_the_gradient_of_a_dense_one(precision: Precision) -> None:
    module = quantize(random_linear(64, 33), precision)
    module.bias.requires_grad_()
    plain = dense(module)
    x = torch.randn(2, 5, 64)
    for each in (module, plain):
        each(x).square().sum().backward()
    torch.testing.assert_close(module.bias.grad, plain.bias.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_codes_and_scales_follow_a_model_to_another_device(precision: Precision) -> None:
    model = Chain(quantize(random_linear(64, 96), precision), quantize(random_linear(96, 37), precision))
    x = torch.randn(5, 64)
    expected, packed = model(x), model.second.packed()
    model.to("cuda")
    assert {tensor.device.type for tensor in model.second.packed().values()} == {"cuda"}
    assert equal({name: tensor.cpu() for name, tensor in model.second.packed().items()}, packed)
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)


def test_state_dict_holds_the_layout_and_loads_into_another(precision: Precision) -> None:
    one, other = quantize(random_linear(64, 33), precision), quantize(random_linear(64, 33), precision)
    assert equal(one.state_dict(), {**one.packed(), "bias": one.bias.data})
    assert {name: t.data_ptr() for name, t in one.state_dict(prefix="p.").items()} == {
        f"p.{name}": t.data_ptr() for name, t in {**one.packed(), "bias": one.bias}.items()
    }
    assert not equal(one.packed(), other.packed())
    other.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()})
    x = torch.randn(2, 64)
    assert equal(one.packed(), other.packed())
    assert torch.equal(one(x), other(x))


def test_state_dicts_that_do_not_fit_are_refused(precision: Precision) -> None:
    module = quantize(random_linear(64, 33), precision)
    with pytest.raises(RuntimeError, match=r"Missing key.*codes.*[\s\S]*Unexpected key.*weight"):
        module.load_state_dict(random_linear(64, 33).state_dict())
    state = module.state_dict()
    with pytest.raises(RuntimeError, match=r"codes is torch.float32"):
        module.load_state_dict({**state, "codes": state["codes"].float()})
    with pytest.raises(RuntimeError, match=r"codes is torch"):
        module.load_state_dict({**state, "codes": state["codes"][:-1]})


def test_states_that_do_not_fit_are_refused(precision: Precision) -> None:
    state = quantize(random_linear(64, 33), precision).packed()
    for broken, found in (
        ({name: tensor for name, tensor in state.items() if name != "codes"}, "'codes' .* is missing"),
        ({**state, "codes": state["codes"].flatten()[:-1]}, "'codes' .* is torch"),
        ({**state, "codes": state["codes"].half()}, "'codes' .* is torch.float16"),
    ):
        with pytest.raises(UserError, match=found):
            rebuild(broken, 33, 64, precision=precision, bias=None, dtype=torch.float32)


def test_more_bits_never_raise_the_error() -> None:
    for seed in range(5):
        weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
        error = {p: (quantize_dequantize(weight, p) - weight).norm() / weight.norm() for p in PRECISIONS}
        assert max(e for p, e in error.items() if p.bits == 8) < min(e for p, e in error.items() if p.bits == 4) / 5
        assert error[Precision("nf4", 4)] < error[Precision("nf4", 4, group=128)] < error[Precision("fp4", 4)] < 0.15


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (Precision("nf", 4), r"no number format 'nf'.*Did you mean 'nf4'\?.*nf4-double, fp4, fp4-double, int8"),
        (Precision("int8", 7), r"int8 has no 7 bits\. Give 8 bits.*1, 2, 3, 4, 5, 6, 8 bits"),
        (Precision("nf4", 3), r"nf4 has no 3 bits\. Give 4 bits"),
        (Precision("nf4", 4, 100), r"nf4 has no groups of 100 weights\. Give one of 32, 64, .*1024, or none"),
        (Precision("int8", 8, 64), r"int8 has no groups of 64 weights\. Leave the group out"),
        (DENSE, r"'dense' leaves a weight alone"),
    ],
)
def test_what_is_not_offered_is_said(precision: Precision, message: str) -> None:
    with pytest.raises(UserError, match=message):
        format_for(precision)
