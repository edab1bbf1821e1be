import bitsandbytes as bnb
import pytest
import torch
from support.linears import Chain, lora_gradients, quantize_dequantize, random_linear, with_lora
from torch import Tensor, nn

from qpruner.modeling_compressed import CODE_BOOKS, scale_code_book
from qpruner.plan import Precision
from qpruner.quantization.blockwise4 import quant_state
from qpruner.quantization.formats import dequantize, layout_of, quantize

SCALE_BOOK = scale_code_book(torch.device("cpu"))
NAMES = ["nf4", "nf4-double", "fp4", "fp4-double"]


def by_hand(state: dict[str, Tensor], name: str, group: int, shape: tuple[int, int]) -> Tensor:
    """The documented layout, weight by weight."""
    book = CODE_BOOKS[name.removesuffix("-double")]
    values, num_weights = [], shape[0] * shape[1]
    for index in range(num_weights):
        byte, block = int(state["codes"][index // 2]), index // group
        if name.endswith("-double"):
            scale = SCALE_BOOK[int(state["scale_codes"][block])] * state["scale_scales"][block // 256]
            scale = scale + state["scale_offset"]
        else:
            scale = state["scales"][block]
        values.append(torch.tensor(book[byte % 16 if index % 2 else byte // 16]) * scale)
    return torch.stack(values).view(shape)


def test_a_weight_by_hand() -> None:
    linear = nn.Linear(5, 1, bias=False)
    linear.weight.data = torch.tensor([[2.0, -2.0, 0.0, 0.89, 0.16]])
    state = quantize(linear, Precision("nf4", 4)).packed()
    # Over the largest, 2: 1 -1 0 0.445 0.08, which are nearest to the values 15, 0, 7, 12 and 8; then four idle bits.
    assert [byte >> 4 for byte in state["codes"].tolist()] == [15, 7, 8]
    assert [byte % 16 for byte in state["codes"].tolist()][:2] == [0, 12]
    assert state["scales"].tolist() == [2.0]


@pytest.mark.parametrize("name", NAMES)
# In the third, rows of 96 weights in groups of 64, the kernel of bitsandbytes for AVX512 would mix up scales.
@pytest.mark.parametrize(
    ("shape", "group"), [((3, 172), 64), ((3, 37), 32), ((11, 96), 64), ((2, 192), 128), ((1, 1), 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layout_decodes_by_torch_alone_to_what_the_kernels_use(
    name: str, shape: tuple[int, int], group: int, dtype: torch.dtype
) -> None:
    linear = random_linear(shape[1], shape[0], dtype)
    linear.weight.data *= torch.rand(shape[0], 1, dtype=dtype)  # scales that differ much
    module = quantize(linear, Precision(name, 4, group))
    weight = by_hand(module.packed(), name, group, shape)
    assert torch.equal(dequantize(module), weight)
    assert torch.equal(quantize_dequantize(linear.weight.detach(), module.precision), weight)
    x = torch.randn(2, shape[1])
    assert torch.equal(module(x), nn.functional.linear(x, weight, module.bias.float()))
    assert torch.equal(module.unpack(dtype), weight.to(dtype))


def test_layout_is_that_of_bitsandbytes() -> None:
    weight = torch.randn(32, 64)
    for name in NAMES:
        module = quantize(nn.Linear(64, 32), Precision(name, 4))
        packed, x = module.packed(), torch.randn(3, 64)
        book = name.removesuffix("-double")
        state = quant_state(packed, (32, 64), book, 64, torch.float32)  # which CUDA multiplies by
        assert torch.equal(dequantize(module), bnb.functional.dequantize_4bit(packed["codes"].view(-1, 1), state))
        assert torch.equal(bnb.matmul_4bit(x, packed["codes"], state, bias=module.bias), module(x))
        codes, state = bnb.functional.quantize_4bit(
            weight, quant_type=name.removesuffix("-double"), compress_statistics="-double" in name
        )
        assert torch.equal(
            quantize_dequantize(weight, Precision(name, 4)), bnb.functional.dequantize_4bit(codes, state)
        )


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_are_the_nearest_values(name: str) -> None:
    weight = torch.randn(8, 48)
    blocks = weight.view(-1, 64)
    scaled = blocks / blocks.abs().amax(dim=1, keepdim=True)
    book = torch.tensor(CODE_BOOKS[name])
    nearest = book[(scaled.unsqueeze(-1) - book).abs().argmin(dim=-1)] * blocks.abs().amax(dim=1, keepdim=True)
    assert torch.equal(quantize_dequantize(weight, Precision(name, 4)), nearest.view(8, 48))


def test_code_books_are_those_of_the_kernels() -> None:
    for name, book in CODE_BOOKS.items():
        assert torch.equal(torch.tensor(book), bnb.functional.get_4bit_type(name, device="cpu"))
    assert torch.equal(SCALE_BOOK, bnb.functional.create_dynamic_map())


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_quantizing_again_changes_nothing(name: str) -> None:
    once = quantize_dequantize(torch.randn(33, 172), Precision(name, 4))
    assert torch.equal(quantize_dequantize(once, Precision(name, 4)), once)


def test_double_quantization_moves_scales_little_and_saves_three_quarters_of_them() -> None:
    linear = random_linear(512, 512)
    plain, double = (quantize(linear, Precision(name, 4)) for name in ("nf4", "nf4-double"))
    size = {name: tensor.nbytes for name, tensor in double.packed().items()}
    assert size == {"codes": 2**17, "scale_codes": 4096, "scale_scales": 64, "scale_offset": 4}
    assert plain.packed()["scales"].nbytes == 4 * 4096
    ratio = dequantize(double) / dequantize(plain)
    assert 0 < (ratio[ratio.isfinite()] - 1).abs().max() < 0.05


def test_blocks_of_zeros_stay_zero() -> None:
    weight = torch.cat([torch.zeros(1, 64), torch.randn(3, 64)])
    assert torch.equal(quantize_dequantize(weight, Precision("nf4", 4))[0], torch.zeros(64))


# On CPUs with AVX512-BF16 the linear of bitsandbytes re-packs such shapes (out a multiple of 32) in evaluation.


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_leaves_weights_and_gradients_alone(name: str) -> None:
    linears = random_linear(64, 96), random_linear(96, 64)
    x = torch.randn(5, 64)
    model = with_lora(Chain(*(quantize(linear, Precision(name, 4, 32)) for linear in linears)))
    layer = model.base_model.model.second.base_layer
    packed = {key: tensor.clone() for key, tensor in layer.packed().items()}
    before = lora_gradients(model, x)
    with torch.no_grad():
        model.eval()(x)
    after = lora_gradients(model, x)
    assert before.keys() == after.keys() and len(before) == 4
    assert all(before[key].abs().max() > 0 and torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(tensor, packed[key]) for key, tensor in layer.packed().items())


def test_it_computes_in_the_dtype_of_each_input() -> None:
    module = quantize(random_linear(64, 32), Precision("nf4", 4))
    x = torch.randn(3, 64)
    in_bfloat16 = module(x.bfloat16())
    assert in_bfloat16.dtype == torch.bfloat16
    expected = nn.functional.linear(x, dequantize(module), module.bias)
    assert torch.equal(module(x), expected)  # the input before it left nothing behind
    assert torch.equal(module(x.bfloat16()), in_bfloat16)


def test_groups_are_64_when_nothing_is_said() -> None:
    linear = random_linear(64, 32)
    silent, said = (quantize(linear, Precision("fp4", 4, group)).packed() for group in (None, 64))
    assert all(torch.equal(silent[key], said[key]) for key in said)
    assert layout_of(32, 64, Precision("fp4", 4))["scales"].shape == (32,)
