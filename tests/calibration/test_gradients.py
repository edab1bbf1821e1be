import copy
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from support.families import random_tokens, tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qpruner import anatomy
from qpruner.anatomy import Coupled, decoder_layers
from qpruner.calibration.gradients import gradient_sums
from qpruner.calibration.norms import input_norms
from qpruner.calibration.text import Calibration
from qpruner.errors import UserError
from qpruner.processes import Processes
from qpruner.pruning.criteria import GradientCriterion, element_scores, sum_by_unit

N, T, VOCAB = 6, 9, 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "intermediate_size": 5,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Double precision wherever the source asks for single, so that what differs is a mistake and not rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(family: str = "llama", **overrides: Any) -> Any:
    """A random model whose weights are frozen, with biases that are not zero (Qwen2), of the default type."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    model = model_class(config_class(**SHAPE | overrides)).to(torch.get_default_dtype()).eval()
    for parent in list(model.modules()):
        for name, _ in list(parent.named_children()):
            if name.endswith("norm"):  # those of transformers compute in single precision
                setattr(parent, name, nn.RMSNorm(SHAPE["hidden_size"], eps=1e-6))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.requires_grad_(False)


def sequences(count: int = N) -> Tensor:
    return torch.randint(VOCAB, (count, T), generator=torch.Generator().manual_seed(5))


def calibration(tokens: Tensor, size: int = N, **changes: Any) -> Calibration:
    """Text in micro-batches of some sequences, of one process unless told."""
    return Calibration.share(tokens, replace(Processes.alone(), **changes), size * T)


def coupled_weights(model: Any) -> dict[str, Coupled]:
    return {
        f"{number}.{part.name}": part
        for number, layer in enumerate(decoder_layers(model))
        for part in (*layer.group_weights, *layer.channel_weights)
    }


def linears_of(model: Any) -> dict[str, nn.Linear]:
    return {name: part.linear for name, part in coupled_weights(model).items()}


def unit_sums(model: Any, given: Calibration, criterion: GradientCriterion) -> dict[str, Tensor]:
    """Scores of each unit by each weight, signed for `vectorize`."""
    parts = coupled_weights(model)

    def consume(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        weight = parts[name].linear.weight.detach().float()
        return sum_by_unit(parts[name], element_scores(criterion, weight, gradient, squared))

    sizes = {name: part.num_units for name, part in parts.items()}
    second = criterion in ("param_second", "param_mix")
    return gradient_sums(model, linears_of(model), given, consume, sizes=sizes, per_sequence=second)


def weight_gradients(model: Any, given: Calibration, *, squared: bool = False) -> dict[str, Tensor]:
    """Whole gradients, or sums of squared ones, of each linear's weight."""
    linears = linears_of(model)

    def consume(name: str, gradient: Tensor, squares: Tensor | None) -> Tensor:
        assert (squares is None) == (not squared)
        return (gradient if squares is None else squares).double().flatten()

    sizes = {name: linear.weight.numel() for name, linear in linears.items()}
    sums = gradient_sums(model, linears, given, consume, sizes=sizes, per_sequence=squared)
    return {name: total.view_as(linears[name].weight) for name, total in sums.items()}


def mean_loss(model: Any, tokens: Tensor) -> Tensor:
    """Over sequences, of each one's mean loss."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def autograd_gradients(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Of the mean loss, by a plain backward pass through a copy whose weights are all trained."""
    trained = copy.deepcopy(model).requires_grad_(True)
    mean_loss(trained, tokens).backward()
    return {name: linear.weight.grad for name, linear in linears_of(trained).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float) -> None:
    """Each tensor to a share of its largest element."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert float((found[name] - values).abs().max()) <= rel * float(values.abs().max()), name
        assert float(values.abs().max()) > 0, name


FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen2"])


@FAMILIES
@pytest.mark.usefixtures("exact")
def test_vectorize_is_the_derivative_of_the_loss_in_a_gate_on_the_unit(family: str) -> None:
    model, tokens = build(family), sequences()
    scores = unit_sums(model, calibration(tokens, 4), "vectorize")
    step = 1e-4

    def gated_loss(part: Coupled, unit: int, gate: float) -> float:
        mine = slice(unit * part.width, (unit + 1) * part.width)
        if part.axis == 1:  # what the unit contributes to the inputs of o and down

            def scale(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
                factors = torch.ones(module.in_features)
                factors[mine] = gate
                return (inputs[0] * factors,)

            handle = part.linear.register_forward_pre_hook(scale)
            loss = float(mean_loss(model, tokens))
            handle.remove()
            return loss
        before = part.linear.weight[mine].clone()
        part.linear.weight[mine] *= gate
        loss = float(mean_loss(model, tokens))
        part.linear.weight[mine] = before
        return loss

    checked = 0
    with torch.no_grad():
        for name, part in coupled_weights(model).items():
            for unit in range(part.num_units):
                slope = (gated_loss(part, unit, 1 + step) - gated_loss(part, unit, 1 - step)) / (2 * step)
                assert float(scores[name][unit]) == pytest.approx(slope, rel=1e-5, abs=1e-9)
                checked += 1
    assert checked == 2 * (4 * 3 + 3 * 5)


@FAMILIES
@pytest.mark.usefixtures("exact")
def test_gradients_are_those_of_autograd(family: str) -> None:
    model, tokens = build(family), sequences()
    expected = autograd_gradients(model, tokens)
    assert_close(weight_gradients(model, calibration(tokens)), expected, 1e-12)
    assert_close(weight_gradients(model, calibration(tokens, 4)), expected, 1e-12)


@pytest.mark.parametrize("family", anatomy.FAMILIES)
def test_gradients_of_every_family_are_those_of_autograd(family: str) -> None:
    """Scaled and capped logits, sliding windows and tied heads included."""
    model, tokens = tiny_model(family).requires_grad_(False), random_tokens(5, 20)
    inside = {module for block in anatomy.decoder_blocks(model) for module in block.modules()}
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and one in inside}

    def consume(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        return gradient.double().flatten()

    sizes = {name: linear.in_features * linear.out_features for name, linear in linears.items()}
    given = Calibration.share(tokens, Processes.alone(), 2 * 20)
    found = gradient_sums(model, linears, given, consume, sizes=sizes, per_sequence=False)
    model.requires_grad_(True)
    mean_loss(model, tokens).backward()
    for name, linear in linears.items():
        gradient = linear.weight.grad.flatten()
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name
        assert float(gradient.norm()) > 0


def test_single_precision_is_enough() -> None:
    model, tokens = build(), sequences()
    assert_close(weight_gradients(model, calibration(tokens)), autograd_gradients(model, tokens), 1e-5)


@pytest.mark.parametrize("size", [N, 4, 1])
@FAMILIES
@pytest.mark.usefixtures("exact")
def test_squared_gradients_are_those_of_each_sequence_alone(family: str, size: int) -> None:
    model, tokens = build(family), sequences()
    alone = [autograd_gradients(model, one[None]) for one in tokens]
    expected = {name: sum(one[name].square() for one in alone) / N for name in alone[0]}
    assert_close(weight_gradients(model, calibration(tokens, size), squared=True), expected, 1e-12)


@pytest.mark.usefixtures("exact")
def test_gradients_and_squared_gradients_come_together() -> None:
    model, tokens = build(), sequences()
    found: dict[str, Tensor] = {}

    def consume(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        found[name] = gradient
        return torch.zeros(1)

    linears = linears_of(model)
    gradient_sums(model, linears, calibration(tokens), consume, sizes=dict.fromkeys(linears, 1), per_sequence=True)
    assert_close(found, autograd_gradients(model, tokens), 1e-12)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("criterion", get_args(GradientCriterion))
def test_scores_do_not_depend_on_the_micro_batch(criterion: GradientCriterion) -> None:
    model, tokens = build(), sequences()
    whole = unit_sums(model, calibration(tokens), criterion)
    for size in (1, 2, 4):
        assert_close(unit_sums(model, calibration(tokens, size), criterion), whole, 1e-10)


@pytest.mark.usefixtures("exact")
def test_first_order_is_the_product_of_weight_and_gradient() -> None:
    model, tokens = build(), sequences()
    parts = coupled_weights(model)
    expected = {}
    for name, gradient in autograd_gradients(model, tokens).items():
        each = (parts[name].linear.weight * gradient).abs()
        expected[name] = torch.stack([block.sum() for block in each.split(parts[name].width, dim=parts[name].axis)])
    found = unit_sums(model, calibration(tokens, 4), "param_first")
    assert_close(found, expected, 1e-12)
    signed = unit_sums(model, calibration(tokens, 4), "vectorize")
    assert all((found[name] > signed[name].abs()).all() for name in signed)


@pytest.mark.usefixtures("exact")
def test_mix_is_first_order_less_half_of_second_order_of_each_weight() -> None:
    model, tokens = build(), sequences()
    parts = coupled_weights(model)
    first = weight_gradients(model, calibration(tokens))
    second = weight_gradients(model, calibration(tokens), squared=True)
    expected = {}
    for name, part in parts.items():
        weight = part.linear.weight
        each = (weight * first[name] - weight**2 * second[name] / 2).abs()
        expected[name] = torch.stack([block.sum() for block in each.split(part.width, dim=part.axis)])
    assert_close(unit_sums(model, calibration(tokens), "param_mix"), expected, 1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("criterion", ["vectorize", "param_mix"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.usefixtures("exact")
def test_gradient_checkpointing_changes_nothing(reentrant: bool, criterion: GradientCriterion) -> None:
    model, given = build().train(), calibration(sequences(), 4)
    expected = unit_sums(model, given, criterion)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    with model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1)):
        assert_close(unit_sums(model, given, criterion), expected, 1e-12)
    assert len(calls) == 2 * 2  # two micro-batches, forward and again for the backward pass


def hooks_of(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_left_as_it_was(tied: bool, training: bool) -> None:
    model = build(tie_word_embeddings=tied).train(training)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = sequences()
    for act in (
        lambda: unit_sums(model, calibration(tokens, 4), "vectorize"),
        lambda: unit_sums(model, calibration(tokens, 4), "param_mix"),
        lambda: input_norms(model, linears_of(model), calibration(tokens, 4)),
    ):
        act()
        assert hooks_of(model) == 0
        assert all(p.grad is None and not p.requires_grad for p in model.parameters())
        assert all(module.training is training for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = build()

    def consume(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        raise KeyError(name)

    linears = linears_of(model)
    sizes = dict.fromkeys(linears, 1)
    with pytest.raises(KeyError):
        gradient_sums(model, linears, calibration(sequences()), consume, sizes=sizes, per_sequence=False)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("per_sequence", [True, False])
def test_each_gradient_is_used_once_and_gone_before_the_next(per_sequence: bool) -> None:
    model = build()
    linears = linears_of(model)
    seen: list[str] = []
    alive: list[weakref.ref[Tensor]] = []

    def consume(name: str, gradient: Tensor, squared: Tensor | None) -> Tensor:
        assert gradient.dtype == torch.float32
        assert gradient.shape == linears[name].weight.shape
        assert all(one() is None for one in alive)
        seen.append(name)
        alive.extend(weakref.ref(one) for one in (gradient, squared) if one is not None)
        return torch.zeros(1, dtype=torch.float64)

    sizes = dict.fromkeys(linears, 1)
    gradient_sums(model, linears, calibration(sequences(), 4), consume, sizes=sizes, per_sequence=per_sequence)
    assert sorted(seen) == sorted(linears)  # of two micro-batches together
    assert {name[0] for name in seen[:7]} == {"1"}  # from the last layer down
    assert all(one() is None for one in alive)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [N, 2])
@pytest.mark.parametrize("criterion", ["vectorize", "param_mix"])
def test_the_sequence_whose_gradient_is_not_finite_is_named(
    value: float, size: int, criterion: GradientCriterion
) -> None:
    model, tokens = build(), sequences().clamp(max=VOCAB - 2)
    tokens[3, 4] = VOCAB - 1
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCAB - 1] = value
    with pytest.raises(UserError, match=r"sequence 3 \(counted from 0\)"):
        unit_sums(model, calibration(tokens, size), criterion)
    assert hooks_of(model) == 0


def shared_between_two(tokens: Tensor, size: int, act: Callable[[Calibration], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the second of two processes finds, each of which had every other micro-batch."""
    of_first: list[Tensor] = []

    def remember(total: Tensor) -> Tensor:
        of_first.append(total.clone())
        return total

    act(calibration(tokens, size, world_size=2, rank=0, reduce=remember))
    return act(calibration(tokens, size, world_size=2, rank=1, reduce=lambda total: total + of_first.pop(0)))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("criterion", ["vectorize", "param_first", "param_second", "param_mix"])
def test_two_processes_sum_to_one(criterion: GradientCriterion) -> None:
    model, tokens = build(), sequences()
    expected = unit_sums(model, calibration(tokens, 2), criterion)
    found = shared_between_two(tokens, 2, lambda given: unit_sums(model, given, criterion))
    assert_close(found, expected, 1e-12)


@pytest.mark.usefixtures("exact")
def test_a_process_without_micro_batches_adds_nothing() -> None:
    model = build()
    nothing = Calibration([], N, Processes.alone())
    for criterion in ("vectorize", "param_mix"):
        sums = unit_sums(model, nothing, criterion)
        assert list(sums) == list(coupled_weights(model)) and not any(total.any() for total in sums.values())
    assert not any(norm.any() for norm in input_norms(model, linears_of(model), nothing).values())


def test_a_bad_sequence_of_another_process_is_reported_here_too() -> None:
    model, tokens = build(), sequences()
    given = calibration(tokens, 2, reduce=lambda total: total * math.nan)
    with pytest.raises(UserError, match="of another process"):
        unit_sums(model, given, "vectorize")


@pytest.mark.usefixtures("exact")
def test_input_norms_are_those_of_what_the_linears_receive() -> None:
    model, tokens = build(), sequences()
    linears = linears_of(model)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, inputs: seen.__setitem__(name, inputs[0])

    handles = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    expected = {name: torch.linalg.norm(inputs.flatten(0, 1), dim=0) for name, inputs in seen.items()}
    for size in (N, 4, 1):
        assert_close(input_norms(model, linears, calibration(tokens, size)), expected, 1e-12)
    two = shared_between_two(tokens, 2, lambda given: input_norms(model, linears, given))
    assert_close(two, expected, 1e-12)


def test_the_model_computes_in_the_given_context() -> None:
    model, tokens = build(), sequences()
    given = calibration(tokens, 4, forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    types: list[torch.dtype] = []
    hooked = [*linears_of(model).values(), model.lm_head]
    handles = [linear.register_forward_hook(lambda _, args, output: types.append(output.dtype)) for linear in hooked]
    unit_sums(model, given, "vectorize")
    assert types == [torch.bfloat16] * 2 * (3 * 7 + 1)  # micro-batches; the first block twice, the last; the head
    types.clear()
    input_norms(model, linears_of(model), given)
    assert types == [torch.bfloat16] * 2 * 2 * 7
    for handle in handles:
        handle.remove()


def test_autocast_gives_gradients_in_single_precision() -> None:
    model, tokens = build(), sequences()
    given = calibration(tokens, forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    assert_close(weight_gradients(model, given), autograd_gradients(model, tokens), 0.1)
