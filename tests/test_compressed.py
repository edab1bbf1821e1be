"""A model under compression: what each step leaves, in which state, and what the folder gives back."""

import ast
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qpruner.adapter_files import has_trained_adapters
from qpruner.adapters.lora import LoRAConfig, adapter_on
from qpruner.compressed import CompressedModel, State
from qpruner.errors import UserError
from qpruner.folder_manifest import Step, identity_of, read_manifest
from qpruner.model_folder import load_compressed
from qpruner.plan import UNITS, CompressionPlan, Leading, Precision
from qpruner.pricing import price_narrowed
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.bank import fill

KEPT = [([1], list(range(0, 40))), ([0, 1], list(range(8, 48)))]
ORDER = [*range(5, 32), *range(5)]
EIGHT = dict.fromkeys(UNITS, Precision("int8", 8))
FOUR = dict.fromkeys(UNITS, Precision("nf4", 4, 64))
LORA = LoRAConfig(r=2, dropout=0.0)
CPU = torch.device("cpu")


def dense(base: Path) -> CompressedModel:
    return CompressedModel.load(str(base), dtype="float32")


def quantized_plan(model: CompressedModel, units: dict[str, Precision] = EIGHT) -> CompressionPlan:
    plan = model.known_plan()
    return plan.with_precision([units] * len(plan.layers))


def loftq(iterations: int = 1) -> LoftQSettings | None:
    return LoftQSettings.of(LORA, iterations, seed=3)


@torch.no_grad()
def logits(model: CompressedModel | Any) -> Tensor:
    network = model.network if isinstance(model, CompressedModel) else model
    output: Tensor = network.eval()(input_ids=torch.arange(18).view(2, 9)).logits
    return output


def nudge(model: CompressedModel) -> None:
    """Gives the adapters values that matter."""
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))


def prune(model: CompressedModel) -> None:
    model.prune(KEPT)


def reorder(model: CompressedModel) -> None:
    model.reorder(ORDER)


def quantize(model: CompressedModel) -> None:
    model.quantize(quantized_plan(model), loftq(), device=CPU)


def attach(model: CompressedModel) -> None:
    model.attach(LORA, seed=3)


def detach(model: CompressedModel) -> None:
    model.detach()


def mask(model: CompressedModel) -> None:
    model.mask(KEPT)


def merge(model: CompressedModel) -> None:
    model.merge(torch.float32)


STEPS: dict[str, Callable[[CompressedModel], None]] = {
    "prune": prune, "reorder": reorder, "quantize": quantize, "attach": attach, "detach": detach, "mask": mask,
    "merge": merge,
}  # fmt: skip
WAYS: dict[State, tuple[str, ...]] = {
    State.DENSE: (),
    State.PRUNED: ("prune",),
    State.QUANTIZED: ("prune", "quantize"),
    State.ADAPTED: ("prune", "quantize", "attach"),
    State.MERGED: ("attach", "merge"),
}
LEADS: dict[tuple[State, str], State] = {
    (State.DENSE, "prune"): State.PRUNED,
    (State.DENSE, "reorder"): State.PRUNED,
    (State.DENSE, "quantize"): State.QUANTIZED,
    (State.DENSE, "attach"): State.ADAPTED,
    (State.PRUNED, "reorder"): State.PRUNED,
    (State.PRUNED, "quantize"): State.QUANTIZED,
    (State.PRUNED, "attach"): State.ADAPTED,
    (State.QUANTIZED, "attach"): State.ADAPTED,
    (State.ADAPTED, "detach"): State.QUANTIZED,
    (State.ADAPTED, "mask"): State.ADAPTED,
    (State.ADAPTED, "merge"): State.MERGED,
    (State.MERGED, "prune"): State.PRUNED,
    (State.MERGED, "reorder"): State.PRUNED,
    (State.MERGED, "quantize"): State.QUANTIZED,
    (State.MERGED, "attach"): State.ADAPTED,
}


@pytest.mark.parametrize(("state", "step"), itertools.product(State, STEPS))
def test_each_step_leads_from_some_states_to_one_and_is_refused_in_others(
    tiny_llama: Path, state: State, step: str
) -> None:
    if (state, step) in {(State.PRUNED, "prune"), (State.ADAPTED, "prune")}:
        return  # again, to other widths; tested below
    model = dense(tiny_llama)
    for earlier in WAYS[state]:
        STEPS[earlier](model)
    assert model.state is state
    if (state, step) in LEADS:
        STEPS[step](model)
        assert model.state is LEADS[state, step]
    else:
        before, plan = logits(model), model.plan
        with pytest.raises(UserError, match=rf"A model that is {state} cannot be .*; only one that is .* can"):
            STEPS[step](model)
        assert model.state is state and model.plan == plan and torch.equal(logits(model), before)


def test_nobody_else_writes_its_fields() -> None:
    """Neither ``x.compressed.y = ...`` nor ``x.model.y = ...`` anywhere but in its own file."""
    fields = {"network", "plan", "base_state", "recipe", "kept", "masks", "initial_adapters", "base_sha256"}
    root = Path(__file__).parents[1]
    for path in [*root.glob("qpruner/**/*.py"), *root.glob("callbacks/*.py"), *root.glob("datamodules/*.py")]:
        if path.name == "compressed.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for target in getattr(node, "targets", []):
                if isinstance(target, ast.Attribute) and target.attr in fields:
                    held = ast.unparse(target.value)
                    assert not held.endswith((".compressed", ".held", "job.model")), f"{path}: {ast.unparse(node)}"


# Pruning.


def test_pruning_twice_keeps_units_by_their_number_in_the_dense_model(tiny_llama: Path) -> None:
    twice, at_once = dense(tiny_llama), dense(tiny_llama)
    twice.prune(KEPT)
    size, rounded = twice.prune([([0], list(range(10, 40))), ([1], list(range(30)))])
    at_once.prune([([1], list(range(10, 40))), ([1], list(range(8, 38)))])
    assert twice.plan == at_once.plan and torch.equal(logits(twice), logits(at_once))
    assert rounded == {} and size.parameters == sum(p.numel() for p in twice.network.parameters())


def test_hidden_channels_in_another_order_are_known_by_the_plan_and_change_nothing(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    model.prune([([1, 0], list(range(48))[::-1])] * 2)
    expected, columns = logits(model), model.network.model.layers[1].mlp.up_proj.weight
    model.reorder(ORDER)
    model.reorder(ORDER)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    plan = model.known_plan()
    assert plan.hidden == (*range(10, 32), *range(10))
    assert torch.equal(model.network.model.layers[1].mlp.up_proj.weight, columns[:, plan.hidden])
    assert plan.layers[0].kv_groups == (1, 0) and plan.layers[0].ffn_channels == tuple(range(48))[::-1]


def test_two_segments_narrow_below_adapters_as_the_plan_says(tiny_llama: Path, tmp_path: Path) -> None:
    led = {
        unit: Precision("affine", 4, 32, Leading(columns, Precision("int8", 8)))
        for unit, columns in {"qkv": 20, "o": 8, "gate_up": 20, "down": 20}.items()
    }
    model = dense(tiny_llama)
    model.quantize(quantized_plan(model, led), loftq(), device=CPU)
    assert model.initial_adapters
    attach(model)
    nudge(model)
    model.prune(KEPT)
    first, second = model.known_plan().layers
    assert first.precision["o"] == led["o"].rest  # of group 1 none was among the first 8 columns
    assert first.precision["down"] == led["down"] and second.precision["o"] == led["o"]
    assert second.precision["down"] == Precision("affine", 4, 32, Leading(12, Precision("int8", 8)))  # 8 to 19
    for number, layer in enumerate(model.network.get_base_model().model.layers):
        held = {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj, "qkv": layer.self_attn.q_proj}
        for unit, linear in held.items():
            assert linear.base_layer.precision == model.known_plan().layers[number].precision[unit]
    model.keep(tmp_path / "model", tokenizer=None)
    opened = CompressedModel.open(tmp_path / "model", trained_adapters=True)
    attach(opened)
    assert torch.equal(logits(opened), logits(model))


def test_masked_and_then_narrowed_adapters_give_the_same_logits(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    model.quantize(quantized_plan(model), loftq(), device=CPU)
    model.attach(LORA, seed=3)
    nudge(model)
    model.mask(KEPT)
    masked = logits(model)
    size, _ = model.prune(KEPT)
    assert model.masks is None and (model.state, model.base_state) == (State.ADAPTED, State.QUANTIZED)
    torch.testing.assert_close(logits(model), masked, rtol=1e-4, atol=1e-5)
    adapters = [adapter_on(module) for module in model.network.get_base_model().modules()]
    assert all(a is None or (a.lora_A.requires_grad and a.lora_A.dtype == torch.float32) for a in adapters)
    assert size.parameters < sum(p.numel() for p in model.parameters())  # that of the base, without adapters


# Quantizing.


def test_a_bank_quantizes_again_and_again(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    bank = fill(model.network, [EIGHT["qkv"], FOUR["qkv"]], loftq(), device=CPU)
    afresh = dense(tiny_llama)
    afresh.quantize(quantized_plan(afresh, FOUR), loftq(), device=CPU)
    afresh.attach(LORA, seed=3)
    for units in (FOUR, EIGHT, FOUR):
        model.quantize(quantized_plan(model, units), loftq(), device=CPU, bank=bank)
        model.attach(LORA, seed=3)
        last = logits(model)
        model.detach()
        assert model.state is State.QUANTIZED and model.initial_adapters == {}
    assert torch.equal(last, logits(afresh)) and model.plan == afresh.plan


def test_average_bits_are_those_of_the_plan_and_none_of_a_base_as_it_came(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    assert model.average_bits is None
    model.prune(KEPT)
    assert model.average_bits == 32
    plan = quantized_plan(model)
    expected = price_narrowed(model.network, plan, rank=0).average_bits
    model.quantize(plan, None, device=CPU)
    assert model.average_bits == expected < 10


def test_merged_it_is_dense_with_the_adapters_in_its_weights(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    prune(model)
    model.rank_adapters([1, 2])
    quantize(model)
    attach(model)
    nudge(model)
    adapted = logits(model)
    model.merge(torch.float32)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)
    assert model.plan is not None and not model.plan.quantized and not model.has_packed_weights()
    assert set(model.plan.ranks) == {None}  # those of adapters that are gone
    assert model.recipe == (Step(name="merge", options={"dtype": "float32"}),)
    assert not any(parameter.requires_grad for parameter in model.parameters())


# Folders.


def test_a_folder_gives_back_state_recipe_plan_and_the_start_of_adapters(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    prune(model)
    model.record(Step(name="StructuredPruning", options={"ratio": 0.1}))
    assert model.identity is None
    quantize(model)
    attach(model)
    expected = logits(model)
    model.keep(tmp_path / "model", tokenizer=None)
    assert torch.equal(logits(model), expected)  # the adapters were off it meanwhile
    again = CompressedModel.open(tmp_path / "model")
    assert again.kept == model.kept and again.identity == model.identity is not None
    assert (again.state, again.recipe, again.plan) == (State.QUANTIZED, model.recipe, model.plan)
    assert (again.base, again.base_sha256) == (str(tiny_llama), model.base_sha256)
    assert again.has_initial_adapters
    attach(again)
    assert torch.equal(logits(again), expected)


def test_trained_adapters_do_not_change_by_what_a_base_is_known(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    quantize(model)
    attach(model)
    model.keep(tmp_path / "model", tokenizer=None)
    known_by = model.identity
    nudge(model)
    model.keep_adapters(trained=True)
    assert has_trained_adapters(tmp_path / "model")
    assert identity_of(read_manifest(tmp_path / "model")) == known_by
    assert torch.equal(logits(load_compressed(tmp_path / "model")), logits(model))
    # A fit begins anew from the base alone; one that continues begins with the adapters.
    bare = CompressedModel.open(tmp_path / "model")
    attach(bare)
    assert not torch.equal(logits(bare), logits(model))
    going_on = CompressedModel.open(tmp_path / "model", trained_adapters=True)
    attach(going_on)
    assert torch.equal(logits(going_on), logits(model))


def test_keeping_leaves_masks_and_mode_as_they_were(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    model.attach(LoRAConfig(r=2, dropout=0.5), seed=3)
    nudge(model)
    model.mask(KEPT)
    expected = logits(model)  # in evaluation mode
    model.keep(tmp_path / "model", tokenizer=None)
    assert not any(module.training for module in model.network.modules())
    assert model.masks is not None
    assert [tuple(map(list, units)) for units in model.masks.kept] == [tuple(map(list, units)) for units in KEPT]
    assert torch.equal(logits(model), expected)
    model.network.train()
    model.keep(tmp_path / "model", tokenizer=None)
    assert all(module.training for module in model.network.modules())


def test_masks_outlive_a_pruning_that_fails(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(tiny_llama)
    model.attach(LoRAConfig(r=2, dropout=0.0), seed=3)
    nudge(model)
    model.mask(KEPT)
    expected = logits(model)

    def narrow(network: Any, kept: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("qpruner.compressed.narrow_", narrow)
        with pytest.raises(MemoryError):
            model.prune(KEPT)
    assert torch.equal(logits(model), expected)
    model.prune(KEPT)
    assert model.masks is None
    torch.testing.assert_close(logits(model), expected)


def test_pooled_adapters_are_not_narrowed(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    model.quantize(quantized_plan(model, dict.fromkeys(UNITS, Precision("affine", 4, 32))), None, device=CPU)
    model.attach(LoRAConfig(r=2, dropout=0.0, pooled=True), seed=3)
    before, plan = logits(model), model.plan
    with pytest.raises(UserError, match="pooled adapters cannot be pruned"):
        model.prune(KEPT)
    assert model.plan == plan and torch.equal(logits(model), before)


def test_detached_adapters_do_not_come_back(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    attach(model)
    nudge(model)
    model.keep(tmp_path / "model", tokenizer=None, trained=True)
    again = CompressedModel.open(tmp_path / "model", trained_adapters=True)
    attach(again)
    again.detach()
    assert again.starts_as_peft
    attach(again)
    assert torch.equal(logits(again), logits(dense(tiny_llama)))


@pytest.mark.parametrize("step", ["keep", "prune"])
def test_adapters_outlive_a_step_that_fails(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model = dense(tiny_llama)
    attach(model)
    nudge(model)
    expected = logits(model)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no room")

    with monkeypatch.context() as failing:
        failing.setattr("qpruner.model_folder.write_base", fail)
        failing.setattr("qpruner.compressed.narrow_", fail)
        with pytest.raises(OSError, match="no room"):
            model.keep(tmp_path / "model", tokenizer=None) if step == "keep" else model.prune(KEPT)
    assert torch.equal(logits(model), expected) and model.state == State.ADAPTED
    model.keep(tmp_path / "model", tokenizer=None)
    model.prune(KEPT)


def test_another_weight_another_recipe_or_another_state_is_another_base(tiny_llama: Path, tmp_path: Path) -> None:
    def known_by(change: Callable[[CompressedModel], object]) -> str | None:
        model = dense(tiny_llama)
        prune(model)
        change(model)
        model.keep(tmp_path / "model", tokenizer=None)
        return model.identity

    def compensated(model: CompressedModel) -> None:
        with torch.no_grad():  # as by what depends on text, and so on more than the plan
            model.network.model.layers[0].mlp.down_proj.weight[0, 0] += 1e-3

    plain = known_by(lambda model: None)
    assert plain == known_by(lambda model: None)
    changes = (compensated, quantize, lambda model: model.record(Step(name="x", options={})))
    assert len({plain, *map(known_by, changes)}) == 4


def test_a_changed_base_is_not_known_by_its_old_folder(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    assert model.identity == model.base_sha256 is not None
    prune(model)
    model.keep(tmp_path / "model", tokenizer=None)
    first = model.identity
    quantize(model)
    assert model.identity is None and model.kept is None
    model.keep(tmp_path / "model", tokenizer=None)
    assert model.identity not in {None, first}


def test_a_dense_model_is_known_by_its_own_files_kept_or_not(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    attach(model)
    nudge(model)
    model.keep(tmp_path / "model", tokenizer=None, trained=True)
    assert model.identity == model.base_sha256 == CompressedModel.open(tmp_path / "model").identity
    assert torch.equal(logits(load_compressed(tmp_path / "model")), logits(model))


def test_sizes_are_looked_at_always_and_hashes_when_asked(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    prune(model)
    model.keep(tmp_path / "model", tokenizer=None)
    weights = tmp_path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    CompressedModel.open(tmp_path / "model", check_hashes=False)
    with pytest.raises(UserError, match="was altered: its SHA-256 is not"):
        CompressedModel.open(tmp_path / "model")
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match="it was cut off or altered"):
        CompressedModel.open(tmp_path / "model", check_hashes=False)


def test_a_folder_with_adapters_is_a_base_without_them(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    prune(model)
    attach(model)
    nudge(model)
    model.keep(tmp_path / "model", tokenizer=None, trained=True)
    with pytest.warns(UserWarning, match="is taken as the base without its adapters"):
        taken = CompressedModel.load(str(tmp_path / "model"), dtype="float32")
    assert taken.state is State.DENSE and taken.recipe == ()
    assert taken.known_plan().architecture == model.known_plan().widths  # narrow is what it came as
    model.detach()
    assert torch.equal(logits(taken), logits(model))


def test_scales_and_minima_train_in_place_of_adapters_until_they_are_settled(tiny_llama: Path, tmp_path: Path) -> None:
    model = dense(tiny_llama)
    two = quantized_plan(model, dict.fromkeys(UNITS, Precision("affine", 2, 32)))
    model.quantize(two, loftq(), device=CPU)
    attach(model)
    model.keep(tmp_path / "before", tokenizer=None)
    identity, begun = model.identity, logits(model)
    adapters = trained(model)
    model.loosen()
    grids = trained(model)
    model.loosen()
    assert trained(model) == grids and len(grids) == 2 * 14 and not set(grids) & set(adapters)
    nudge(model)
    moved = logits(model)
    assert (moved - begun).abs().max() > 0.05
    # Given up, it is what it was, and known as that.
    model.settle(polished=False)
    assert torch.equal(logits(model), begun) and model.identity == identity and trained(model) == adapters
    model.loosen()
    nudge(model)
    with pytest.raises(AssertionError, match="settled before they are kept"):
        model.keep(tmp_path / "after", tokenizer=None)
    model.settle()
    assert model.identity is None and model.base_state is State.QUANTIZED and trained(model) == adapters
    assert (logits(model) - moved).abs().max() < 0.01  # float16
    model.keep(tmp_path / "after", tokenizer=None, trained=True)
    again = CompressedModel.open(tmp_path / "after", trained_adapters=True)
    attach(again)
    assert torch.equal(logits(again), logits(model))


def test_what_has_no_grid_cannot_be_loosened(tiny_llama: Path) -> None:
    model = dense(tiny_llama)
    with pytest.raises(UserError, match="A model that is dense cannot be polished"):
        model.loosen()
    model.quantize(quantized_plan(model, FOUR), None, device=CPU)
    attach(model)
    before = trained(model)
    with pytest.raises(UserError, match=r"tiny_llama' has no linear in a number format .* such as \{4: affine\}"):
        model.loosen()
    assert trained(model) == before != []


def trained(model: CompressedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
