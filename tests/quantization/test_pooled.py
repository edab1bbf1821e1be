"""Adapters that are folded into minima: against the sum of weight and adapter, and as they train."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import adapted, logits_of, packed, random_tokens, tiny_model

from qpruner.adapters.lora import LoRAConfig, adapter_on
from qpruner.compressed import CompressedModel
from qpruner.dense_copy import merge_run
from qpruner.errors import UserError
from qpruner.model_folder import load_base, load_compressed
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.quantization.apply import LoftQSettings
from qpruner.quantization.formats import dequantize
from qpruner.quantization.pooled import check_poolable, fold_, pool_

AFFINE = Precision("affine", 3, 32)


def pooled_model(precision: Precision = AFFINE, **changes: Any) -> Any:
    """A model whose adapters were pooled before they gave anything."""
    model = adapted(packed(tiny_model("llama", **changes), precision))
    given = [adapter.lora_B.detach().clone() for adapter in factors(model)]
    with torch.no_grad():
        for adapter in factors(model):
            adapter.lora_B.zero_()
        pool_(model)
        for adapter, lora_B in zip(factors(model), given, strict=True):
            adapter.lora_B.copy_(lora_B)
    return model


def factors(model: Any) -> list[Any]:
    return [adapter for module in model.modules() if (adapter := adapter_on(module)) is not None]


@pytest.mark.parametrize("group", [32, -1])
def test_a_linear_gets_the_sum_of_weight_and_adapter(group: int) -> None:
    model = pooled_model(Precision("affine", 3, group))
    name = "model.layers.1.mlp.down_proj"  # 48 columns: a group of 32 and a short one
    adapter = adapter_on(model.get_base_model().get_submodule(name))
    assert adapter is not None
    before = dequantize(adapter.base)
    expected = before + adapter.scale * adapter.lora_B @ adapter.lora_A
    codes = adapter.base.get_parameter("codes").clone()
    base = fold_(model)
    folded = base.get_submodule(name)
    assert torch.equal(folded.get_parameter("codes"), codes)
    minima = folded.get_parameter("minima").abs().max()
    assert (dequantize(folded) - expected).abs().max() < 2**-11 * minima  # half an ulp of float16
    assert (before - expected).abs().max() > 0.1


def test_a_group_that_a_plan_leaves_open_is_that_of_the_format() -> None:
    model = pooled_model(Precision("affine", 3, None), intermediate_size=160)
    adapter = adapter_on(model.get_base_model().get_submodule("model.layers.1.mlp.down_proj"))
    assert adapter is not None and adapter.base.get_parameter("minima").shape[1] == 3
    parts = adapter.lora_A.detach().split(64, dim=1)  # 160 columns: two groups of 64 and a short one
    assert [part.shape[1] for part in parts] == [64, 64, 32]
    assert all(torch.equal(part, part[:, :1].expand_as(part)) for part in parts)
    assert len({part[0, 0].item() for part in parts}) == 3
    expected = dequantize(adapter.base) + adapter.scale * adapter.lora_B @ adapter.lora_A
    folded = fold_(model).get_submodule("model.layers.1.mlp.down_proj")
    assert (dequantize(folded) - expected).abs().max() < 2**-11 * folded.get_parameter("minima").abs().max()


def test_factors_are_equal_within_groups_and_stay_so_as_they_train() -> None:
    model = pooled_model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    before = [adapter.lora_A.detach().clone() for adapter in factors(model)]
    for _ in range(3):
        model(input_ids=random_tokens(), use_cache=False).logits.logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for adapter, start in zip(factors(model), before, strict=True):
        after = adapter.lora_A.detach()
        assert (after - start).abs().mean() > 0.01
        for first in range(0, after.shape[1], 32):
            columns = after[:, first : first + 32]
            assert (columns - columns[:, :1]).abs().max() < 1e-6


def test_the_gradient_is_the_mean_over_a_group() -> None:
    model, free = pooled_model(), adapted(packed(tiny_model("llama"), AFFINE))
    with torch.no_grad():
        for adapter, other in zip(factors(model), factors(free), strict=True):
            other.lora_A.copy_(adapter.lora_A)
    for one in (model, free):
        one(input_ids=random_tokens(), use_cache=False).logits.logsumexp(-1).mean().backward()
    for adapter, other in zip(factors(model), factors(free), strict=True):
        whole = other.lora_A.grad[:, :32].mean(1)
        torch.testing.assert_close(adapter.lora_A.grad[:, 7], whole, rtol=1e-4, atol=1e-7)


def test_what_is_no_group_of_float16_minima_is_refused() -> None:
    check_poolable("q_proj", AFFINE)
    for precision in (Precision("affine-double", 3, 32), Precision("nf4", 4, 64)):
        with pytest.raises(UserError, match=r"q_proj is held in .* minima of the format 'affine' alone"):
            check_poolable("q_proj", precision)
    with pytest.raises(UserError, match="q_proj is dense"):
        pool_(adapted(tiny_model("llama")))


def test_free_adapters_cannot_be_folded() -> None:
    with pytest.raises(UserError, match="were not trained with --model.lora.pooled"):
        fold_(adapted(packed(tiny_model("llama"), AFFINE)))


def test_what_has_no_adapters_cannot_be_folded() -> None:
    with pytest.raises(UserError, match="has no adapters to fold"):
        fold_(packed(tiny_model("llama"), AFFINE))


def test_adapters_that_give_something_are_not_changed() -> None:
    with pytest.raises(UserError, match="give something and were not trained with --model.lora.pooled"):
        pool_(adapted(packed(tiny_model("llama"), AFFINE)))


def test_pooled_adapters_start_from_zero() -> None:
    assert LoftQSettings.of(LoRAConfig(pooled=True), 1, seed=0) is None
    assert LoftQSettings.of(LoRAConfig(), 1, seed=0) is not None


def write(folder: Path, base: Path, *, trained: bool) -> Path:
    """A folder with pooled adapters that say something."""
    model = CompressedModel.load(str(base), dtype="float32")
    plan = CompressionPlan.dense(model.known_plan().architecture, None)
    plan = plan.with_precision([dict.fromkeys(UNITS, AFFINE)] * len(plan.layers))
    model.quantize(plan, None, device=torch.device("cpu"))
    model.attach(LoRAConfig(r=2, dropout=0.0, pooled=True), seed=0)
    with torch.no_grad():
        for adapter in factors(model.network):
            adapter.lora_B.normal_(std=0.1)
    model.keep(folder, tokenizer=None, trained=trained)
    return folder


def test_a_folder_stays_packed_and_says_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tiny_llama, trained=True)
    merge_run(folder, tmp_path / "folded", "bfloat16", packed=True)
    expected, loaded = load_compressed(folder), load_base(tmp_path / "folded")
    assert loaded.plan == load_base(folder).plan
    logits = logits_of(expected, tokens := torch.tensor([[3, 5, 7, 9]]))
    assert (logits_of(loaded.network, tokens) - logits).abs().max() < 0.01 * logits.std()
    without = logits_of(load_base(folder).network, tokens)
    assert (without - logits).abs().max() > 0.1 * logits.std()
    before, after = (load_base(place).network.state_dict() for place in (folder, tmp_path / "folded"))
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in after if not name.endswith("minima"))


def test_adapters_come_back_pooled(tiny_llama: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tiny_llama, trained=False)
    model = CompressedModel.open(folder)
    model.attach(LoRAConfig(r=2, dropout=0.0, pooled=True), seed=0)
    written = load_compressed(folder)
    for adapter, other in zip(factors(model.network), factors(written), strict=True):
        assert torch.equal(adapter.lora_A, other.lora_A)
        assert torch.equal(adapter.lora_B, other.lora_B)
    copied = copy.deepcopy(model.network)
    assert torch.equal(logits_of(copied, torch.tensor([[3, 5]])), logits_of(model.network, torch.tensor([[3, 5]])))
