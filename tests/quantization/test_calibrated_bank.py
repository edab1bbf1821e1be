"""Banks whose codes are rounded by text, against rounding by hand on what reaches each linear of the dense model."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.calibration import calibration, hooks_of, in_processes
from support.families import LAYERS, logits_of, random_tokens, tiny_model
from support.quantized import settings
from torch import Tensor

from qpruner.allocation.items import Item
from qpruner.allocation.rises import measured_rises
from qpruner.anatomy import architecture_of, unit_linears
from qpruner.calibration.blocks import evaluating
from qpruner.calibration.input_sums import InputSums
from qpruner.calibration.output_gradients import output_weights
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.errors import UserError
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.processes import Processes
from qpruner.quantization import bank as banks
from qpruner.quantization import calibrated
from qpruner.quantization.bank import Bank, fill, fill_folder, open_folder
from qpruner.quantization.calibrated import calibrate_
from qpruner.quantization.calibrated_bank import BankText
from qpruner.quantization.calibrated_inputs import HELD_OUT, CalibratedConfig
from qpruner.quantization.calibrated_layers import CalibratedLayers
from qpruner.quantization.formats import GridFormat, dequantize, format_for, quantize
from qpruner.quantization.rounding import RoundingConfig, error, round_weight

S, T = 24, 20
TEXT = random_tokens(S, T)
FAST = CalibratedConfig(rounding=RoundingConfig(grid="minmax", refinements=0))
CPU = torch.device("cpu")
ONE, TWO, FOUR, NF4 = (
    Precision("affine", 1, 32), Precision("affine-double", 2, 32), Precision("affine", 4, 32), Precision("nf4", 4, 64)
)  # fmt: skip


def frozen(family: str = "llama") -> Any:
    return tiny_model(family).requires_grad_(False)


def by(config: CalibratedConfig, text: Calibration | None = None, name: str = "a") -> BankText:
    return BankText(config, {"text": name}, text or calibration(5, TEXT))


def in_folder(
    folder: Path, model: Any, text: BankText, *, precisions: Any = (ONE, TWO), processes: Processes | None = None
) -> Bank:
    processes = processes or Processes.alone()
    return fill_folder(folder, model, precisions, None, base="tiny", processes=processes, text=text)


def names_of(model: Any) -> list[str]:
    return [name for units in unit_linears(model) for names in units.values() for name in names]


def same(first: Bank, second: Bank) -> bool:
    return first.tensors.keys() == second.tensors.keys() and all(
        torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items()
    )


class DenseSums:
    """Sums of what reaches each linear when the text goes through a whole dense model, a micro-batch at a time."""

    def __init__(self, model: Any, config: CalibratedConfig) -> None:
        text, linears = calibration(5, TEXT), {name: model.get_submodule(name) for name in names_of(model)}
        groups = config.output_groups
        by_loss = output_weights(model, linears, text, groups) if groups else {}
        seen: dict[str, Tensor] = {}
        modules = linears | {str(number): block for number, block in enumerate(model.model.layers)}
        handles = [
            module.register_forward_hook(
                lambda _, args, output, name=name: seen.update({name: output if name.isdigit() else args[0]})
            )
            for name, module in modules.items()
        ]
        units = {
            name: (n, unit) for n, layer in enumerate(unit_linears(model)) for unit in UNITS for name in layer[unit]
        }
        self.sums = {
            (name, held): InputSums.none(max(groups, 1), linear.in_features, CPU, cross=False, dense=False)
            for name, linear in linears.items()
            for held in (False, True)
        }
        for place, batch in enumerate(text.batches):
            with torch.no_grad(), evaluating(model):
                model(input_ids=batch.tokens, use_cache=False)
            rows = (batch.first + torch.arange(len(batch.tokens))) % HELD_OUT == HELD_OUT - 1
            for name, (number, unit) in units.items():
                counts = torch.ones(len(rows), T, 1)
                if config.tokens == "normed" and unit in ("o", "down") and not groups:
                    counts = seen[str(number)].square().mean(-1, keepdim=True).reciprocal()
                if groups:
                    counts = counts * by_loss[name][place]
                for held in (False, True):
                    chosen = rows if held else ~rows
                    self.sums[name, held].add_(seen[name][chosen].flatten(0, 1), None, counts[chosen].flatten(0, 1))
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("family", "tokens", "groups"),
    [("llama", "normed", 0), ("llama", "normed", 2), ("qwen2", "equal", 0)],
)
def test_codes_are_those_of_rounding_on_what_reaches_a_linear_of_the_dense_model(
    family: str, tokens: Any, groups: int
) -> None:
    model = frozen(family)
    config = replace(FAST if groups else CalibratedConfig(), tokens=tokens, output_groups=groups)
    original = copy.deepcopy(model)
    bank = fill(model, (ONE, DENSE, TWO, NF4), None, device=CPU, text=by(config))
    assert hooks_of(model) == 0 and all(map(torch.equal, model.state_dict().values(), original.state_dict().values()))
    sums, kept = DenseSums(original, config).sums, 0
    for name in names_of(original):
        linear = original.get_submodule(name)
        for precision in (ONE, TWO):
            number_format = format_for(precision)
            assert isinstance(number_format, GridFormat)
            by_text = round_weight(
                linear.weight, number_format, precision, sums[name, False].hessian, replace(config.rounding, alpha=0.0)
            )
            held_out, plain = sums[name, True].hessian, dequantize(quantize(linear, precision))
            errors = [error(linear.weight, values, held_out) for values in (plain, by_text.values)]
            expected = by_text.values if errors[1] < errors[0] else plain
            assert torch.equal(bank.weight(name, precision, CPU), expected)
            kept += errors[1] < errors[0]
        assert torch.equal(bank.weight(name, NF4, CPU), dequantize(quantize(linear, NF4)))  # has no grid
    assert kept > 10


def test_held_out_text_is_never_worse_than_at_the_nearest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(weight: Tensor, *args: Any, name: str) -> Any:
        return round_weight(-weight if "down" in name else weight, *args, name=name)

    monkeypatch.setattr(calibrated, "round_weight", spoilt)
    model = frozen()
    config = replace(FAST, tokens="equal")
    bank, plain = (fill(model, [TWO], None, device=CPU, text=text) for text in (by(config), None))
    sums = DenseSums(model, config).sums
    for name in names_of(model):
        weights = [one.weight(name, TWO, CPU) for one in (bank, plain)]
        by_text, nearest = (error(model.get_submodule(name).weight, each, sums[name, True].hessian) for each in weights)
        assert by_text < nearest or torch.equal(*weights)
        assert "down" not in name or torch.equal(*weights)


def test_adapters_start_as_asked_and_assembled_models_run() -> None:
    model = frozen()
    start, plan = settings(rank=4), CompressionPlan.dense(architecture_of(model.config), None)
    two = plan.with_precision([dict.fromkeys(UNITS, TWO)] * LAYERS)
    by_weight, by_outputs = (
        fill(model, [TWO], start, device=CPU, text=by(replace(FAST, adapters=adapters)))
        for adapters in ("weight", "calibrated")
    )
    distances = []
    for name in names_of(model):
        weight = model.get_submodule(name).weight
        left = weight - by_weight.weight(name, TWO, CPU)
        starts = [bank.factors(name, TWO) or () for bank in (by_weight, by_outputs)]
        distances.append([float((left - start.scale * b @ a).norm()) for a, b in starts])
        assert distances[-1][0] == pytest.approx(float(torch.linalg.svdvals(left)[4:].norm()), rel=1e-3)
    assert all(by_weight < by_outputs for by_weight, by_outputs in distances)
    dense = logits_of(model)
    assert by_weight.assemble_(model, two).keys() == set(names_of(model))
    assert logits_of(model).isfinite().all() and not torch.equal(logits_of(model), dense)


def with_large_weights_on_dead_channels(layer: int) -> Any:
    """A model of which one layer has, on every 16th input of each linear, weights ten times as large and no input."""
    model = tiny_model("llama").requires_grad_(False)
    block = model.model.layers[layer]
    attention, mlp = block.self_attn, block.mlp
    for before, linears in (
        (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (attention.v_proj, (attention.o_proj,)),
        (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        (mlp.up_proj, (mlp.down_proj,)),
    ):
        before.weight[::16] = 0
        for linear in linears:
            linear.weight[:, ::16] *= 10
    return model


def test_bits_go_where_rounding_by_text_needs_them() -> None:
    """Plain grids are spoilt by weights that never matter, so that plain costs give four bits to the wrong layer."""
    model, text = with_large_weights_on_dead_channels(2), calibration(5, TEXT)
    config = CalibratedConfig(rounding=RoundingConfig(damping=0.01, refinements=0))
    items = [Item(number, UNITS) for number in range(LAYERS)]
    chosen = []
    for rounding in (None, by(config)):
        bank = fill(model, (TWO, FOUR), None, device=CPU, text=rounding)
        kl, _ = measured_rises(model, bank, items, (TWO, FOUR), text)
        chosen.append(int((kl[:, 0] - kl[:, 1]).argmax()))  # the one of three that gets four bits; all are as large
    dense, divergences = logits_of(model, TEXT).log_softmax(-1), []
    for layer in range(LAYERS):
        compressed = copy.deepcopy(model)
        plan = CompressionPlan.dense(architecture_of(model.config), None).with_precision(
            [dict.fromkeys(UNITS, FOUR if number == layer else TWO) for number in range(LAYERS)]
        )
        calibrate_(compressed, plan, config, None, text, CalibratedLayers(None, {}))
        after = logits_of(compressed, TEXT).log_softmax(-1)
        divergences.append(float((dense.exp() * (dense - after)).sum(-1).mean()))
    plain, by_text = chosen
    assert by_text == divergences.index(min(divergences))
    assert divergences[by_text] < 0.7 * divergences[plain]


# Folders.


def test_a_bank_that_was_cut_off_goes_on_from_its_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = frozen(), replace(FAST, output_groups=1)
    whole = fill(model, (ONE, TWO), None, device=CPU, text=by(config))

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if "layer-001" in path.name:
            raise KeyboardInterrupt
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(banks, "save_file", save)
        with pytest.raises(KeyboardInterrupt):
            in_folder(tmp_path, model, by(config))
    assert [path.name for path in tmp_path.iterdir()] == ["layer-000.safetensors"]
    rounds: list[str] = []
    monkeypatch.setattr(
        calibrated, "round_weight", lambda *args, name: rounds.append(name) or round_weight(*args, name=name)
    )
    assert same(in_folder(tmp_path, model, by(config)), whole)
    assert {name.split(".")[2] for name in rounds} == {"1", "2"} and len(rounds) == 2 * 2 * 7
    assert same(open_folder(tmp_path, model, None, base="tiny", text=by(config)), whole)
    assert same(in_folder(tmp_path, model, by(config)), whole) and len(rounds) == 2 * 2 * 7


OTHERS = {
    "text": by(FAST, calibration(5, TEXT.flip(0)), "b"),
    "options": by(replace(FAST, tokens="skip")),
    "nearest": None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_bank_of_another_text_or_other_options_is_made_again(tmp_path: Path, other: str) -> None:
    model = frozen()
    first = in_folder(tmp_path, model, by(FAST), precisions=[TWO])
    with pytest.raises(
        UserError, match=r"layer-000.* belongs to a bank of another model, .*LoftQ start or calibration"
    ):
        open_folder(tmp_path, model, None, base="tiny", text=OTHERS[other])
    first = Bank(model, {key: tensor.clone() for key, tensor in first.tensors.items()})  # not mapped
    with pytest.warns(UserWarning, match="It is made again"):
        again = in_folder(tmp_path, model, OTHERS[other], precisions=[TWO])  # type: ignore[arg-type]
    assert same(again, fill(model, [TWO], None, device=CPU, text=OTHERS[other])) and not same(again, first)


@pytest.mark.parametrize("kept", [False, True])
def test_two_processes_share_the_text_and_have_the_same_bank(tmp_path: Path, kept: bool) -> None:
    models = [frozen(), frozen()]  # not drawn in the threads, which share a seed
    alone = fill(models[0], [TWO], None, device=CPU, text=by(FAST, calibration(3, TEXT)))

    def work(text: Calibration) -> Bank:
        model = models[text.processes.rank]
        if kept:
            return in_folder(tmp_path, model, by(FAST, text), precisions=[TWO], processes=text.processes)
        return fill(model, [TWO], None, device=CPU, text=by(FAST, text))

    first, second = in_processes(2, 3, work, TEXT)
    assert same(first, second)
    for name in names_of(models[0]):  # between two values, sums decide, which came about in another order
        moved = (first.weight(name, TWO, CPU) - alone.weight(name, TWO, CPU)).abs().gt(1e-6)
        assert moved.float().mean() < 0.02


def test_too_little_text_and_what_is_not_finite_are_told() -> None:
    few = replace(FAST, text=CalibrationConfig(num_sequences=8, length=8))
    with pytest.raises(UserError, match=r"56 tokens decide.* needs as many"):
        fill(frozen(), [TWO], None, device=CPU, text=by(few))
    with pytest.raises(UserError, match="LoRA rank 65 is above that of"):
        fill(frozen(), [TWO], settings(rank=65), device=CPU, text=by(FAST))
    model = frozen()
    model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layer 1 .*not finite"):
        fill(model, [TWO], None, device=CPU, text=by(FAST))


def test_only_layers_that_are_asked_for_are_rounded() -> None:
    model, text = frozen(), by(replace(FAST, text=CalibrationConfig(64, 8)))
    bank, whole = (fill(model, [ONE], None, layers=layers, device=CPU, text=text) for layers in ([1], None))
    assert {key.partition("/")[0].split(".")[2] for key in bank.tensors} == {"1"}
    assert all(torch.equal(tensor, whole.tensors[key]) for key, tensor in bank.tensors.items())
