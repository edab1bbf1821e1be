"""A plan carried out on narrowed models of every family, and what the adapters start from."""

import copy
from typing import Any

import pytest
import torch
from support.families import KEPT, LAYERS, PLAIN
from support.linears import quantize_dequantize
from support.quantized import CPU, INT8, MIXED, NF4, equal, pruned, settings
from torch import Tensor

from qpruner.anatomy import unit_linears
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import DENSE, UNITS, CompressionPlan
from qpruner.quantization.apply import linear_precisions, quantize_
from qpruner.quantization.formats import dequantize
from qpruner.quantization.packed import PackedLinear


def weights(model: Any, plan: CompressionPlan) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in linear_precisions(model, plan)}


@pytest.mark.parametrize("family", PLAIN)
def test_every_linear_has_the_precision_of_its_unit(family: str) -> None:
    model, plan = pruned(family)
    dense, size = weights(model, plan), num_parameters(model)
    assert quantize_(model, plan, None, device=CPU) == {}
    for layer, units in zip(plan.layers, unit_linears(model), strict=True):
        for unit, names in units.items():
            for name in names:
                linear, precision = model.get_submodule(name), layer.precision[unit]
                if precision == DENSE:
                    assert type(linear) is torch.nn.Linear and torch.equal(linear.weight, dense[name])
                else:
                    assert isinstance(linear, PackedLinear) and linear.precision == precision
                    assert torch.equal(dequantize(linear), quantize_dequantize(dense[name], precision))
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert packed == {name for name, precision in linear_precisions(model, plan).items() if precision != DENSE}
    assert num_parameters(model) == size


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("num_iterations", [1, 3])
def test_factors_bring_every_linear_nearer_to_its_weight(family: str, num_iterations: int) -> None:
    """With alpha four times r."""
    model, plan = pruned(family)
    dense, size = weights(model, plan), num_parameters(model)
    factors = quantize_(model, plan, settings(num_iterations=num_iterations), device=CPU)
    quantized = {name for name, precision in linear_precisions(model, plan).items() if precision != DENSE}
    assert factors.keys() == quantized
    for name, (lora_A, lora_B) in factors.items():
        weight, linear = dense[name], model.get_submodule(name)
        held = dequantize(linear)
        alone = (weight - quantize_dequantize(weight, linear.precision)).norm()
        assert (weight - held - 4.0 * lora_B @ lora_A).norm() < 0.99 * alone
        if num_iterations == 1:
            tail = torch.linalg.svdvals(weight - held)[4:].norm()
            torch.testing.assert_close((weight - held - 4.0 * lora_B @ lora_A).norm(), tail, rtol=1e-3, atol=1e-4)
            assert torch.equal(held, quantize_dequantize(weight, linear.precision))
    assert num_parameters(model) == size


def test_biases_stay_and_are_frozen() -> None:
    model, plan = pruned("qwen2", [dict.fromkeys(UNITS, INT8)] * LAYERS)
    biases = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("bias")}
    quantize_(model, plan, settings(), device=CPU)
    after = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert after.keys() == biases.keys() and len(biases) == 3 * LAYERS
    assert all(torch.equal(after[name], bias) and not after[name].requires_grad for name, bias in biases.items())


def test_only_targets_get_factors() -> None:
    model, plan = pruned("llama")
    factors = quantize_(model, plan, settings(targets=("v_proj", "down_proj")), device=CPU)
    assert set(factors) == {  # qkv of layer 1 is dense
        "model.layers.0.self_attn.v_proj",
        "model.layers.2.self_attn.v_proj",
        *(f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)),
    }
    other, plan = pruned("llama")
    quantize_(other, plan, None, device=CPU)
    held = [dequantize(m.get_submodule("model.layers.0.self_attn.q_proj")) for m in (model, other)]
    assert torch.equal(*held)


def test_adapters_start_in_the_rank_that_a_plan_has_for_their_layer() -> None:
    plain = quantize_(*pruned("llama"), settings(rank=3), device=CPU)
    other = quantize_(*pruned("llama"), settings(rank=2), device=CPU)
    model, plan = pruned("llama")
    factors = quantize_(model, plan.with_ranks([2, None, 2]), settings(rank=3), device=CPU)
    of_layer_1 = [name for name in factors if name.startswith("model.layers.1.")]
    assert of_layer_1 and equal(
        {name: factors[name] for name in of_layer_1}, {name: plain[name] for name in of_layer_1}
    )
    others = factors.keys() - of_layer_1
    assert others and equal({name: factors[name] for name in others}, {name: other[name] for name in others})
    narrow, plan = pruned("llama", [dict.fromkeys(UNITS, NF4)] * LAYERS, KEPT)  # one channel in the last layer
    quantize_(copy.deepcopy(narrow), plan.with_ranks([None, None, 1]), settings(rank=2), device=CPU)
    with pytest.raises(UserError, match=r"rank 2 is above that of model\.layers\.2.*, or the rank that a plan has"):
        quantize_(narrow, plan.with_ranks([None, None, 2]), settings(rank=1), device=CPU)


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_factors_depend_on_the_seed_and_not_on_what_was_drawn_or_done_before(num_iterations: int) -> None:
    wanted = settings(num_iterations=num_iterations, rank=2)
    first = quantize_(*pruned("llama"), wanted, device=CPU)
    torch.manual_seed(99)
    assert equal(quantize_(*pruned("llama"), wanted, device=CPU), first)
    # Down projections alone: each comes out as it did among all the others.
    down = settings(num_iterations=num_iterations, rank=2, targets=("down_proj",))
    alone = quantize_(*pruned("llama"), down, device=CPU)
    assert len(alone) == 3 and equal(alone, {name: first[name] for name in alone})


def test_a_rank_above_a_linear_is_told_before_any_is_quantized() -> None:
    model, plan = pruned("llama", [dict.fromkeys(UNITS, NF4)] * LAYERS, KEPT)  # one channel in the last layer
    with pytest.raises(
        UserError, match=r"LoRA rank 2 is above that of model\.layers\.2\.mlp\.gate_proj, which is 1\."
    ) as e:
        quantize_(model, plan, settings(rank=2), device=CPU)
    assert "--model.lora.r to at most 1" in str(e.value)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    # Of no matter where the narrow linears get no adapters, or stay dense, or nothing is corrected.
    quantize_(*pruned("llama", kept=KEPT), settings(rank=16, targets=("q_proj",)), device=CPU)
    dense = [{**MIXED[0]}, {**MIXED[1]}, {**MIXED[2], "gate_up": DENSE, "down": DENSE}]
    assert quantize_(*pruned("llama", dense, KEPT), settings(rank=2), device=CPU)
    assert quantize_(*pruned("llama", kept=KEPT), None, device=CPU) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_float32_of_the_shapes_that_are_left(dtype: torch.dtype) -> None:
    model, plan = pruned("gemma2")
    factors = quantize_(model.to(dtype), plan, settings(rank=3), device=CPU)
    lora_A, lora_B = factors["model.layers.2.mlp.down_proj"]
    assert (lora_A.shape, lora_B.shape) == ((3, 7), (64, 3))
    assert {tensor.dtype for pair in factors.values() for tensor in pair} == {torch.float32}
    assert not any(tensor.requires_grad for pair in factors.values() for tensor in pair)
    assert not model.training


def test_draws_differ_by_linear_and_by_seed() -> None:
    """Where nothing is left to correct, A is drawn."""

    def of_zeros(seed: int) -> list[Tensor]:
        model, plan = pruned("llama", [dict.fromkeys(UNITS, INT8)] * LAYERS)
        for name in linear_precisions(model, plan):
            model.get_submodule(name).weight.data.zero_()
        factors = quantize_(model, plan, settings(seed=seed, targets=("gate_proj", "up_proj")), device=CPU)
        return [factors[f"model.layers.0.mlp.{name}_proj"][0] for name in ("gate", "up")]

    gate, up = of_zeros(0)
    assert gate.any() and not torch.equal(gate, up) and not torch.equal(gate, of_zeros(1)[0])
