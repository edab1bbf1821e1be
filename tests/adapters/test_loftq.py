"""LoftQ against numbers by hand, the exact SVD, and formats that misbehave."""

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor

from qpruner.adapters.loftq import LoftQResult, loftq
from qpruner.errors import UserError

Packed = tuple[Tensor, QuantState]


def nf4(weight: Tensor) -> Packed:
    return quantize_4bit(weight, blocksize=64, quant_type="nf4")


def from_nf4(packed: Packed) -> Tensor:
    return dequantize_4bit(*packed)


def rounded(weight: Tensor) -> Tensor:
    """To whole numbers: the simplest format."""
    return weight.round()


def same(weight: Tensor) -> Tensor:
    return weight


def run(weight: Tensor, quantize=rounded, dequantize=same, **changes) -> LoftQResult:  # type: ignore[no-untyped-def]
    options = {"name": "layer", "rank": 4, "scale": 1.0, "num_iterations": 1, "seed": 0} | changes
    return loftq(weight, quantize, dequantize, **options)


def approximation(result: LoftQResult[Tensor], scale: float = 1.0) -> Tensor:
    return result.quantized + scale * result.lora_B @ result.lora_A


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """Residual diag(0.4, 0.3); rank 1 takes the 0.4; |W|^2 = 2.4^2 + 0.3^2."""
    result = run(torch.diag(torch.tensor([2.4, 0.3])), rank=1, scale=2.0)
    assert torch.equal(result.quantized, torch.diag(torch.tensor([2.0, 0.0])))
    assert torch.allclose(2 * result.lora_B @ result.lora_A, torch.diag(torch.tensor([0.4, 0.0])), atol=1e-6)
    assert result.lora_A.abs().flatten().tolist() == pytest.approx([3**-0.5, 0], abs=1e-6)
    assert result.lora_B.abs().flatten().tolist() == pytest.approx([0.2 * 3**0.5, 0], abs=1e-6)
    assert result.quantization_error == pytest.approx((0.25 / 5.85) ** 0.5)
    assert result.errors == pytest.approx(((0.09 / 5.85) ** 0.5,))


@pytest.mark.parametrize("shape", [(64, 64), (172, 64), (33, 1377)])
def test_one_iteration_leaves_the_tail_of_the_exact_svd(shape: tuple[int, int]) -> None:
    weight = noise(*shape)
    result = run(weight)
    assert result.lora_A.shape == (4, shape[1]) and result.lora_B.shape == (shape[0], 4)
    tail = torch.linalg.svdvals(weight - weight.round())[4:].norm() / weight.norm()
    assert result.error == pytest.approx(float(tail), rel=1e-5)
    assert (weight - approximation(result)).norm() / weight.norm() == pytest.approx(float(tail), rel=1e-5)
    assert result.quantization_error == pytest.approx(float((weight - weight.round()).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("num_iterations", [1, 4])
def test_the_scale_changes_the_factors_and_not_the_start(num_iterations: int) -> None:
    weight = noise(172, 64)
    one, four = (run(weight, scale=scale, num_iterations=num_iterations) for scale in (1.0, 4.0))
    assert torch.allclose(approximation(one), approximation(four, scale=4.0), atol=1e-5)
    assert one.errors == pytest.approx(four.errors, rel=1e-5)
    assert torch.allclose(four.lora_A.norm(dim=1), one.lora_A.norm(dim=1), rtol=1e-4)
    assert torch.allclose(four.lora_B.norm(dim=0), one.lora_B.norm(dim=0) / 4, rtol=1e-4)


def test_rows_of_a_have_the_norm_that_they_have_in_plain_lora() -> None:
    plain = torch.nn.init.kaiming_uniform_(torch.empty(4, 10_000), a=5**0.5)
    result = run(noise(33, 1377))
    assert torch.allclose(result.lora_A.norm(dim=1), plain.norm(dim=1).mean().expand(4), rtol=0.02)


def test_alternation_quantizes_what_the_adapters_leave() -> None:
    weight, targets = noise(40, 30), []

    def quantize(target: Tensor) -> Tensor:
        targets.append(target)
        return target.round()

    result = run(weight, quantize, num_iterations=3, scale=0.5)
    assert len(targets) == len(result.errors) == 3
    assert torch.equal(targets[0], weight)
    u, s, vh = torch.linalg.svd(weight - weight.round())
    assert torch.allclose(targets[1], weight - (u[:, :4] * s[:4]) @ vh[:4], atol=1e-5)


def test_the_best_iterate_is_kept() -> None:
    """A format that is coarse, then fine, then coarser with every call."""
    steps = iter([0.5, 0.1, 1.0, 2.0])

    def quantize(target: Tensor) -> Tensor:
        step = next(steps)
        return (target / step).round() * step

    weight = noise(48, 32)
    result = run(weight, quantize, num_iterations=4)
    assert result.error == result.errors[1] == min(result.errors)
    assert result.errors[0] < result.errors[2] < result.errors[3]
    assert (weight - approximation(result)).norm() / weight.norm() == pytest.approx(result.error, rel=1e-4)


def test_nf4_with_bitsandbytes() -> None:
    weight = 0.02 * noise(512, 384)
    result = run(weight, nf4, from_nf4, rank=8, scale=2.0, num_iterations=5)
    start = from_nf4(result.quantized) + 2.0 * result.lora_B @ result.lora_A
    residual = weight - from_nf4(nf4(weight))
    assert result.quantization_error == pytest.approx(float(residual.norm() / weight.norm()), rel=1e-5)
    exact = torch.linalg.svdvals(residual)[8:].norm() / weight.norm()
    assert exact <= result.errors[0] * (1 + 1e-5)
    # 95 % of the energy that the exact factorisation takes off.
    gain = result.quantization_error**2 - result.errors[0] ** 2
    assert gain > 0.95 * (result.quantization_error**2 - float(exact) ** 2)
    assert result.error < result.errors[0]  # alternation helps here
    assert (weight - start).norm() / weight.norm() == pytest.approx(result.error, rel=1e-5)


def test_draws_depend_on_the_layer_and_the_seed_alone() -> None:
    weight = noise(512, 600)  # large enough for the randomized method
    first = run(weight, name="a")
    torch.manual_seed(123)
    assert torch.equal(run(weight, name="a").lora_A, first.lora_A)
    assert torch.equal(run(weight, name="a").lora_B, first.lora_B)
    assert not torch.equal(run(weight, name="b").lora_A, first.lora_A)
    assert not torch.equal(run(weight, name="a", seed=1).lora_A, first.lora_A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(noise(172, 64).to(dtype))
    result, reference = run(weight, nf4, from_nf4), run(weight.detach().float(), nf4, from_nf4)
    assert result.lora_A.dtype == result.lora_B.dtype == torch.float32 and not result.lora_A.requires_grad
    assert torch.equal(result.lora_B @ result.lora_A, reference.lora_B @ reference.lora_A)
    half = run(weight, lambda target: target.to(dtype))  # a format that dequantizes to half precision
    assert half.error < 1e-2


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_full_rank_reconstructs_the_weight(shape: tuple[int, int]) -> None:
    weight = noise(*shape)
    result = run(weight, rank=24, scale=0.25)
    assert torch.allclose(approximation(result, scale=0.25), weight, atol=1e-5)
    assert result.error < 1e-6 < result.quantization_error


def test_a_rank_above_the_layer_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"LoRA rank 25 is too high for model.q_proj.*highest is 24.*--model.lora.r"):
        run(noise(24, 40), rank=25, name="model.q_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_the_users_mistake(value: float) -> None:
    weight = noise(24, 40)
    weight[3, 5] = value
    with pytest.raises(UserError, match=r"weight of model.q_proj .* not finite"):
        run(weight, name="model.q_proj")


@pytest.mark.parametrize("weight", [noise(300, 400), torch.zeros(300, 400)])
def test_where_nothing_is_left_to_correct_adapters_start_as_plain_lora(weight: Tensor) -> None:
    result = run(weight, same, num_iterations=2)
    assert result.errors == (0.0, 0.0) and result.quantization_error == 0
    assert not result.lora_B.any()
    # Uniform in +-1 / sqrt(in), as PEFT draws: the standard deviation of that is 1 / sqrt(3 in).
    assert float(result.lora_A.std()) == pytest.approx(1200**-0.5, rel=0.05)
    assert float(result.lora_A.abs().max()) <= 0.05


def test_directions_beyond_the_rank_of_the_residual_can_still_learn() -> None:
    weight = 3 * torch.ones(20, 30)
    weight[2] += torch.linspace(-0.4, 0.4, 30)  # a residual of rank 1
    result = run(weight)
    assert torch.allclose(approximation(result), weight, atol=1e-5)
    assert (result.lora_B[:, 1:] == 0).all() and (result.lora_A.norm(dim=1) > 0.1).all()
