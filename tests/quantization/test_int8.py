import copy

import pytest
import torch
from support.linears import Chain, quantize_dequantize, random_linear, with_lora
from torch import nn

from qpruner.plan import Precision
from qpruner.quantization.formats import dequantize, quantize

INT8 = Precision("int8", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_rounded_shares_of_the_largest_in_the_row(dtype: torch.dtype) -> None:
    linear = random_linear(37, 11, dtype)
    weight, state = linear.weight.detach().float(), quantize(linear, INT8).packed()
    assert state["codes"].dtype == torch.int8
    assert torch.equal(state["scales"], weight.abs().amax(dim=1))
    assert torch.equal(state["codes"], (weight / weight.abs().amax(dim=1, keepdim=True) * 127).round().to(torch.int8))


def test_layout_decodes_by_torch_alone() -> None:
    module = quantize(random_linear(37, 11), INT8)
    codes, scales = module.packed().values()
    assert torch.equal(dequantize(module), codes.float() * (scales * (1 / 127))[:, None])


def test_the_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(16, 100)
    error = (quantize_dequantize(weight, INT8) - weight).abs()
    assert (error <= weight.abs().amax(dim=1, keepdim=True) / 254 * 1.0001).all()
    assert error.max() > weight.abs().max() / 600


def test_quantizing_again_keeps_the_codes() -> None:
    module = quantize(random_linear(172, 33), INT8)
    linear = nn.Linear(172, 33)
    linear.weight.data = dequantize(module)
    again = quantize(linear, INT8).packed()
    assert torch.equal(again["codes"], module.packed()["codes"])
    torch.testing.assert_close(again["scales"], module.packed()["scales"], rtol=2e-7, atol=0)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8)])
    assert torch.equal(quantize_dequantize(weight, INT8), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_forward_is_that_of_the_dequantized_weight(dtype: torch.dtype, training: bool) -> None:
    module = quantize(random_linear(64, 32, dtype), INT8).train(training)
    x = 1e5 * torch.randn(3, 5, 64, dtype=dtype)  # beyond the range of float16
    assert torch.equal(module(x), nn.functional.linear(x, dequantize(module).to(dtype), module.bias))


def test_codes_and_scales_stay_through_use_casts_and_copies() -> None:
    module = quantize(random_linear(64, 32), INT8)
    expected = {name: tensor.clone() for name, tensor in module.packed().items()}
    x = torch.randn(2, 64)
    module(x).sum().item()
    with torch.no_grad():
        module.eval()(x)
    copied = copy.deepcopy(module)
    wrapped = with_lora(Chain(copied, quantize(random_linear(32, 64), INT8)))
    wrapped(x)
    for each in (module, copied, module.to(torch.bfloat16), module.float(), module.to("cpu", torch.float16)):
        each(x)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in each.packed().items())
    assert copied.packed()["codes"].data_ptr() != module.packed()["codes"].data_ptr()


def test_the_bias_keeps_its_dtype_when_inputs_have_another() -> None:
    module = quantize(random_linear(64, 32), INT8)
    module(torch.randn(2, 64, dtype=torch.bfloat16))
    assert module.bias.dtype == torch.float32
