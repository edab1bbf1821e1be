"""Rounding by text, block by block, against what whole models show."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.calibration import calibration, hooks_of, in_processes
from support.families import random_tokens, tiny_model
from torch import Tensor

from qpruner.anatomy import architecture_of, unit_linears
from qpruner.calibration.input_sums import InputSums
from qpruner.calibration.output_gradients import output_weights
from qpruner.calibration.text import Calibration, CalibrationConfig
from qpruner.errors import UserError
from qpruner.offload import Shelf
from qpruner.plan import DENSE, UNITS, CompressionPlan, Leading, Precision
from qpruner.processes import Processes
from qpruner.quantization import calibrated
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.calibrated import Calibrated, Packing, calibrate_
from qpruner.quantization.calibrated_inputs import HELD_OUT, CalibratedConfig, SplitSums
from qpruner.quantization.calibrated_layers import CalibratedLayers, Outcome, RoundedLinear
from qpruner.quantization.formats import dequantize, format_for, quantize
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.rounding import RoundingConfig, corrected_weight, error, round_weight

S, T = 24, 20
TEXT = random_tokens(S, T)
TWO_BITS = Precision("affine", 2, 32)
TWO_SEGMENTS = Precision("affine", 2, 32, Leading(20, Precision("symmetric", 3, 64)))
GPTQ = RoundingConfig(method="gptq", grid="minmax", alpha=1.0, damping=0.01)
NOWHERE = CalibratedLayers(None, {})


def plan_of(model: Any, *by_layer: Precision) -> CompressionPlan:
    """A plan with a precision for each layer, or one for all."""
    plan = CompressionPlan.dense(architecture_of(model.config), None)
    layers = by_layer * len(plan.layers) if len(by_layer) == 1 else by_layer
    return plan.with_precision([dict.fromkeys(UNITS, precision) for precision in layers])


def rounded(
    model: Any,
    config: CalibratedConfig,
    *,
    text: Calibration | None = None,
    plan: CompressionPlan | None = None,
    adapters: LoftQSettings | None = None,
    layers: CalibratedLayers = NOWHERE,
) -> Calibrated:
    return calibrate_(model, plan or plan_of(model, TWO_BITS), config, adapters, text or calibration(5, TEXT), layers)


def inputs_of(model: Any, name: str) -> Tensor:
    """What reaches a linear when all text goes through the whole model, [S, T, in]."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=TEXT, use_cache=False)
    handle.remove()
    return seen[0].double()


def leaving(model: Any, number: int) -> Tensor:
    """The hidden states that leave a block, [S, T, H]."""
    with torch.no_grad():
        states = model(input_ids=TEXT, use_cache=False, output_hidden_states=True).hidden_states
    if number + 1 < len(states) - 1:
        return states[number + 1].double()
    seen: list[Tensor] = []
    handle = model.model.layers[number].register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=TEXT, use_cache=False)
    handle.remove()
    return seen[0].double()


@pytest.mark.parametrize(
    ("family", "tokens", "groups"),
    [
        ("llama", "equal", 0),
        ("llama", "skip", 0),
        ("llama", "normed", 0),
        ("llama", "normed", 2),
        ("phi3", "normed", 0),
    ],
)
def test_each_linear_is_rounded_on_what_reaches_it_behind_the_packed_ones_before(
    family: str, tokens: Any, groups: int
) -> None:
    dense, model = (tiny_model(family).requires_grad_(False) for _ in range(2))
    names = [name for units in unit_linears(dense) for names in units.values() for name in names]
    linears = {name: dense.get_submodule(name) for name in names}
    by_loss = output_weights(dense, linears, calibration(5, TEXT), groups) if groups else {}
    result = rounded(model, CalibratedConfig(rounding=GPTQ, output_groups=groups, tokens=tokens))
    decides = torch.arange(S) % HELD_OUT != HELD_OUT - 1
    for number, units in enumerate(unit_linears(dense)):
        weights = torch.ones(S, T, dtype=torch.float64)
        if tokens == "skip":
            weights[:, :4] = 0
        for unit, names in units.items():
            if tokens == "normed":
                normed = unit in ("o", "down") and not groups  # the gradient of the loss has the norm in it
                weights = 1 / leaving(dense, number).square().mean(-1) if normed else torch.ones_like(weights)
            x, z = inputs_of(model, names[0]), inputs_of(dense, names[0])

            for name in names:
                counts = weights.unsqueeze(-1) * (torch.cat(by_loss[name]) if groups else 1)

                def product(a: Tensor, b: Tensor, rows: Tensor, counts: Tensor = counts) -> Tensor:
                    return torch.einsum("sti,stg,stj->gij", a[rows], counts[rows].double(), b[rows])

                hessian, cross = product(x, x, decides), product(z, x, decides)
                weight = dense.get_submodule(name).weight
                target = corrected_weight(weight, hessian, cross, 1.0, GPTQ.damping)
                expected = round_weight(target, format_for(TWO_BITS), TWO_BITS, hessian, GPTQ)  # type: ignore[arg-type]
                plain = dequantize(quantize(dense.get_submodule(name), TWO_BITS))
                packed = model.get_submodule(name)
                outcome = result.outcomes[name]
                got = dequantize(packed)
                # Sums in another order may move a weight that lies between two values.
                kept = expected.values if outcome.kept else plain
                assert (got - kept).abs().gt(1e-6).float().mean() < 0.02
                held_out = [product(a, b, ~decides) for a, b in ((x, x), (z, x), (z, z))]
                size = error(weight, torch.zeros_like(weight), held_out[2])
                assert outcome.plain == pytest.approx(error(weight, plain, *held_out) / size, rel=1e-3)
                if outcome.kept:
                    assert outcome.calibrated == pytest.approx(error(weight, got, *held_out) / size, rel=1e-3)
    assert hooks_of(model) == 0


def test_what_is_worse_on_held_out_text_is_rounded_plainly_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = (tiny_model("llama").requires_grad_(False) for _ in range(2))

    def spoilt(weight: Tensor, *args: Any, name: str) -> Any:
        return round_weight(-weight if "down" in name else weight, *args, name=name)

    monkeypatch.setattr(calibrated, "round_weight", spoilt)
    result = rounded(model, CalibratedConfig(rounding=GPTQ, output_groups=0))
    fallen = [name for name, outcome in result.outcomes.items() if not outcome.kept]
    assert {name for name in result.outcomes if "down" in name} <= set(fallen)
    for name in fallen:
        torch.testing.assert_close(
            dequantize(model.get_submodule(name)), dequantize(quantize(dense.get_submodule(name), TWO_BITS))
        )
    assert f"plain rounding was no worse there for {fallen[0]}" in str(result)


@pytest.mark.parametrize("precision", [TWO_BITS, TWO_SEGMENTS], ids=str)
def test_the_model_gets_nearer_to_the_dense_one(precision: Precision) -> None:
    dense = tiny_model("llama").requires_grad_(False)

    def distance(config: CalibratedConfig | None) -> float:
        model = tiny_model("llama").requires_grad_(False)
        if config is None:
            for name in [name for units in unit_linears(model) for names in units.values() for name in names]:
                model.set_submodule(name, quantize(model.get_submodule(name), precision))
        else:
            rounded(model, config, plan=plan_of(model, precision))
        with torch.no_grad():
            return float((model(input_ids=TEXT).logits - dense(input_ids=TEXT).logits).square().mean())

    by_text = distance(CalibratedConfig(rounding=GPTQ, output_groups=0))
    assert by_text < 0.8 * distance(None)
    assert distance(CalibratedConfig(rounding=GPTQ, output_groups=1)) < 0.8 * distance(None)


def test_formats_without_a_grid_and_dense_units_stay_as_they_are() -> None:
    dense, model = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    nf4 = Precision("nf4", 4, 64)
    result = rounded(model, CalibratedConfig(), plan=plan_of(model, nf4, DENSE, TWO_BITS))
    by_layer = [[name for names in units.values() for name in names] for units in unit_linears(dense)]
    for name in by_layer[0]:
        expected = quantize(dense.get_submodule(name), nf4).packed()
        for part, tensor in model.get_submodule(name).packed().items():
            assert torch.equal(tensor, expected[part])
    assert all(torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight) for name in by_layer[1])
    assert list(result.outcomes) == by_layer[2]


def test_two_segments_are_read_again_as_they_were_rounded(tmp_path: Path) -> None:
    first, again = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    results = [
        rounded(model, CalibratedConfig(), plan=plan_of(model, TWO_SEGMENTS), layers=CalibratedLayers(tmp_path, {}))
        for model in (first, again)
    ]
    assert [result.resumed for result in results] == [[], [0, 1, 2]]
    assert all(outcome.calibrated < outcome.plain for outcome in results[0].outcomes.values() if outcome.kept)
    assert sum(outcome.kept for outcome in results[0].outcomes.values()) >= 18  # of 21
    expected = first.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_adapters_start_from_what_rounding_left_of_the_outputs() -> None:
    model = tiny_model("llama").requires_grad_(False)
    dense = tiny_model("llama").requires_grad_(False)
    settings = LoftQSettings(8, 2.0, "all-linear", 1, 0)
    config = CalibratedConfig(rounding=RoundingConfig(method="nearest", grid="minmax", alpha=0.0), output_groups=0)
    factors = rounded(model, config, adapters=settings).factors
    name = unit_linears(dense)[1]["down"][0]
    x = inputs_of(model, name)[torch.arange(S) % HELD_OUT != HELD_OUT - 1].flatten(0, 1)
    weights = 1 / leaving(dense, 1)[torch.arange(S) % HELD_OUT != HELD_OUT - 1].square().mean(-1).flatten()
    x = x * weights.sqrt().unsqueeze(1)
    left = dense.get_submodule(name).weight.double() - dequantize(model.get_submodule(name)).double()
    lora_A, lora_B = factors[name]
    after = (x @ (left - 2.0 * lora_B.double() @ lora_A.double()).T).norm()
    best = torch.linalg.svdvals(x @ left.T)[8:].norm()
    assert after == pytest.approx(float(best), rel=0.02)  # but for the damping
    of_weight = rounded(
        tiny_model("llama").requires_grad_(False),
        CalibratedConfig(rounding=config.rounding, output_groups=0, adapters="weight"),
        adapters=settings,
    ).factors[name]
    nearest = (left - 2.0 * of_weight[1].double() @ of_weight[0].double()).norm()
    assert nearest == pytest.approx(float(torch.linalg.svdvals(left)[8:].norm()), rel=1e-3)


def test_adapters_start_in_the_rank_that_a_plan_has_for_their_layer() -> None:
    model, dense = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    plain = RoundingConfig(method="nearest", grid="minmax", alpha=0.0)
    config = CalibratedConfig(rounding=plain, output_groups=0, adapters="weight")
    plan = plan_of(model, TWO_BITS).with_ranks([None, 3, 1])
    factors = rounded(model, config, plan=plan, adapters=LoftQSettings(8, 2.0, "all-linear", 1, 0)).factors
    for layer, rank in enumerate((8, 3, 1)):
        name = unit_linears(dense)[layer]["down"][0]
        lora_A, lora_B = factors[name]
        assert len(lora_A) == rank
        left = dense.get_submodule(name).weight - dequantize(model.get_submodule(name))
        tail = torch.linalg.svdvals(left)[rank:].norm()
        torch.testing.assert_close((left - 2.0 * lora_B @ lora_A).norm(), tail, rtol=1e-3, atol=1e-4)


def states_of(model: Any) -> dict[str, Tensor]:
    modules = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    return {f"{name}/{part}": tensor for name, module in modules.items() for part, tensor in module.packed().items()}


def test_a_calibration_that_was_cut_off_goes_on_from_its_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, made_from = CalibratedConfig(), {"base": "tiny"}
    settings = LoftQSettings(4, 2.0, "all-linear", 1, 0)
    whole = tiny_model("llama").requires_grad_(False)
    expected = rounded(whole, config, adapters=settings)

    class Killed(CalibratedLayers):
        def write(self, number: int, *args: Any) -> None:
            if number == 2:
                raise KeyboardInterrupt
            super().write(number, *args)

    cut = tiny_model("llama").requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        rounded(cut, config, adapters=settings, layers=Killed(tmp_path, made_from))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["layer-000.safetensors", "layer-001.safetensors"]

    rounds: list[str] = []
    monkeypatch.setattr(
        calibrated, "round_weight", lambda *args, name: rounds.append(name) or round_weight(*args, name=name)
    )
    model = tiny_model("llama").requires_grad_(False)
    result = rounded(model, config, adapters=settings, layers=CalibratedLayers(tmp_path, made_from))
    assert result.resumed == [0, 1] and all(".layers.2." in name for name in rounds)
    assert result.outcomes == expected.outcomes
    assert states_of(model).keys() == states_of(whole).keys()
    assert all(torch.equal(tensor, states_of(whole)[name]) for name, tensor in states_of(model).items())
    for name, factors in expected.factors.items():
        assert all(torch.equal(*pair) for pair in zip(factors, result.factors[name], strict=True))


def test_layers_of_another_prefix_text_or_plan_are_made_again(tmp_path: Path) -> None:
    def resumed(made_from: dict[str, str]) -> list[int]:
        model = tiny_model("llama").requires_grad_(False)
        return rounded(model, CalibratedConfig(output_groups=0), layers=CalibratedLayers(tmp_path, made_from)).resumed

    assert resumed({"text": "a"}) == []
    assert resumed({"text": "a"}) == [0, 1, 2]
    first = tmp_path / "layer-000.safetensors"
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.warns(UserWarning, match=r"layer-000.*no whole file.*made again"):
        assert resumed({"text": "a"}) == [1, 2]  # made again as it was
    with pytest.warns(UserWarning, match=r"layer-000.*another base, plan or text"):
        assert resumed({"text": "b"}) == []
    first.unlink()
    (tmp_path / "layer-001.safetensors").rename(tmp_path / "layer-000.safetensors")
    with pytest.warns(UserWarning, match=r"layer-000.*after other layers"):
        assert resumed({"text": "b"}) in ([], [2])


@pytest.mark.parametrize("recorded", ["no JSON", "[1]", "null", "[" * 100_000, '{"origin": [1]}', None])
def test_a_file_that_something_else_wrote_is_made_again(tmp_path: Path, recorded: str | None) -> None:
    layers, path = CalibratedLayers(tmp_path, {"text": "a"}), tmp_path / "layer-000.safetensors"
    layer = {"linear": RoundedLinear({"codes": torch.ones(2)}, None, Outcome(True, 2.0, 1.0))}
    metadata = {"format": "pt"} if recorded is None else {"layer": recorded}
    save_file({"weight": torch.ones(2)}, path, metadata)
    with pytest.warns(UserWarning, match=r"layer-000.*It is made again"):
        assert layers.read(0, Processes.alone()) is None
    layers.write(0, layer, Processes.alone())
    read = layers.read(0, Processes.alone())
    assert read is not None and read["linear"].outcome == layer["linear"].outcome


def test_two_processes_find_what_one_does() -> None:
    dense = tiny_model("llama").requires_grad_(False)  # not in the threads, which share a seed

    def work(text: Calibration) -> dict[str, Tensor]:
        model = deepcopy(dense)
        rounded(model, CalibratedConfig(), text=text)
        return {name: dequantize(m) for name, m in model.named_modules() if isinstance(m, PackedLinear)}

    (alone,), (first, second) = in_processes(1, 3, work, TEXT), in_processes(2, 3, work, TEXT)
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        assert (first[name] - weight).abs().gt(1e-6).float().mean() < 0.02  # between two values, sums decide


@pytest.mark.parametrize(
    ("num_sequences", "length", "needed"), [(4, 256, "at least 8 sequences"), (16, 16, "at least 18 sequences")]
)
def test_too_little_text_says_how_much_is_needed(num_sequences: int, length: int, needed: str) -> None:
    config = CalibratedConfig(text=CalibrationConfig(num_sequences, length))
    with pytest.raises(UserError, match=needed):
        config.check_text(250)
    enough = int(needed.split()[2])
    CalibratedConfig(text=CalibrationConfig(enough, length)).check_text(250)


def test_what_is_not_finite_is_refused_by_name() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layer 1 .*not finite"):
        rounded(model, CalibratedConfig(output_groups=0))
    with pytest.raises(UserError, match="output_groups is -1"):
        CalibratedConfig(output_groups=-1)


def test_a_channel_that_is_always_zero_changes_nothing() -> None:
    model = tiny_model("llama").requires_grad_(False)
    up = model.get_submodule("model.layers.1.mlp.up_proj")
    up.weight[3] = 0  # so that the third input of down is
    before = model.get_submodule("model.layers.1.mlp.down_proj").weight.clone()
    outcome = rounded(model, CalibratedConfig()).outcomes["model.layers.1.mlp.down_proj"]
    assert Outcome.of(outcome.plain, outcome.calibrated) == outcome
    column = dequantize(model.get_submodule("model.layers.1.mlp.down_proj"))[:, 3]
    assert column.isfinite().all() and (column - before[:, 3]).abs().max() < 2 * before.abs().max()


@pytest.mark.parametrize(
    "precision", [Precision("affine", 1, 32), Precision("symmetric-double", 8, 64), TWO_BITS, TWO_SEGMENTS], ids=str
)
def test_nearest_on_the_grid_of_the_format_is_plain_encoding(precision: Precision) -> None:
    dense, model = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    config = CalibratedConfig(rounding=RoundingConfig(method="nearest", grid="minmax", alpha=0.0))
    rounded(model, config, plan=plan_of(model, precision))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            expected = quantize(dense.get_submodule(name), precision).packed()
            assert all(torch.equal(tensor, expected[part]) for part, tensor in module.packed().items())


def test_the_target_is_that_of_the_model_before_its_tables_were_packed() -> None:
    """With an embedding in 2 bits, what reaches the first linear differs from what reaches it in the dense model."""
    dense, model = (tiny_model("llama").requires_grad_(False) for _ in range(2))
    plan = plan_of(model, TWO_BITS).with_precision([dict.fromkeys(UNITS, TWO_BITS)] * 3, embedding=TWO_BITS)
    result = rounded(model, CalibratedConfig(rounding=GPTQ), plan=plan)
    name = unit_linears(dense)[0]["qkv"][0]
    x, z = inputs_of(model, name), inputs_of(dense, name)
    held_out = torch.arange(S) % HELD_OUT == HELD_OUT - 1
    x, z = (side[held_out].flatten(0, 1) for side in (x, z))
    weight, values = dense.get_submodule(name).weight.double(), dequantize(model.get_submodule(name)).double()
    expected = ((z @ weight.T - x @ values.T).square().sum() / (z @ weight.T).square().sum()).item()
    outcome = result.outcomes[name]
    assert expected == pytest.approx(outcome.calibrated if outcome.kept else outcome.plain, rel=1e-3)


def test_skipped_tokens_do_not_count() -> None:
    with pytest.raises(UserError, match="Give a length above"):
        CalibratedConfig(tokens="skip", text=CalibrationConfig(64, 4)).check_text(8)
    with pytest.raises(UserError, match=r"224 tokens decide.*at least"):
        CalibratedConfig(tokens="skip", text=CalibrationConfig(64, 8)).check_text(230)
    CalibratedConfig(text=CalibrationConfig(64, 8)).check_text(230)


def test_what_overflows_before_a_linear_is_not_blamed_on_its_weight() -> None:
    model, name = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    size = model.get_submodule(name).in_features
    broken = InputSums(torch.eye(size)[None].double(), torch.full((1, size, size), float("inf")).double(), None)
    packing = Packing(model, CalibratedConfig(rounding=GPTQ), {name: None})
    with pytest.raises(UserError, match=f"What reaches {name} from the calibration text is not finite"):
        packing.round(name, TWO_BITS, SplitSums(broken, broken, Shelf((), None)))
