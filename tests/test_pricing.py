"""Prices against the files that are written, to the byte."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.families import EXPLICIT, FFN, HIDDEN, KEPT, LAYERS, PLAIN, each_of, tiny_config, tiny_model
from support.runs import payload

from qpruner.adapter_files import save_adapters
from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.anatomy import FAMILIES, architecture_of
from qpruner.model_folder import build_skeleton, save_base
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.pricing import average_bits, price
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import quantize_

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
PRECISIONS = [
    DENSE,
    INT8,
    *(
        Precision(name, 4, group)
        for name in ("nf4", "nf4-double", "fp4", "fp4-double")
        for group in (None, 32, 64, 128)
    ),
]
BIASES: dict[str, dict[str, bool]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},  # q, k and v have biases as it is
    "qwen3": {"attention_bias": True},
    "gemma": {"attention_bias": True},
    "gemma2": {"attention_bias": True},
    "gemma3_text": {"attention_bias": True},
    "granite": {"attention_bias": True, "mlp_bias": True},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
    "olmo2": {"attention_bias": True},
    "phi3": {},
    "gpt2": {},  # all have biases as it is
}
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
TARGETS = tuple(f"{name}_proj" for name in PROJECTIONS)


def planned(config: Any, kept: Any, precision: Any) -> CompressionPlan:
    return CompressionPlan.dense(architecture_of(config), None).keeping(kept).with_precision(precision)


def uniform(precision: Precision) -> list[dict[str, Precision]]:
    return [dict.fromkeys(UNITS, precision)] * LAYERS


def write(folder: Path, model: Any, plan: CompressionPlan, rank: int, targets: tuple[str, ...]) -> tuple[int, int]:
    """Carries out a plan and writes its folder; bytes of the base's tensors and of the adapters'."""
    apply_pruning_(model, plan)
    quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(folder, model, plan, base_name="dense", tokenizer=None)
    if not rank:
        return payload(folder / "model.safetensors"), 0
    save_adapters(folder, attach_adapters(model, LoRAConfig(r=rank, target_modules=targets), seed=0), trained=True)
    return payload(folder / "model.safetensors"), payload(folder / "adapter" / "adapter_model.safetensors")


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], range]], list[dict[str, Precision]]]:
    """An FFN width, what each layer keeps of it and of 4 KV groups, and the precision of each unit."""
    channels = draw(st.integers(1, 75))
    groups = st.lists(st.integers(0, 3), min_size=1, unique=True).map(sorted)
    kept = [(draw(groups), range(draw(st.integers(1, channels)))) for _ in range(LAYERS)]
    precision = [{unit: draw(st.sampled_from(PRECISIONS)) for unit in UNITS} for _ in range(LAYERS)]
    return channels, kept, precision


@each_of(PLAIN)
@settings(
    max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(
    layers=layers(),
    biased=st.booleans(),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rank=st.integers(0, 3),
    adapted=st.sets(st.sampled_from(PROJECTIONS), min_size=1),
    hidden=st.sampled_from([HIDDEN, 48]),
    skeleton=st.booleans(),
)
def test_the_price_is_what_the_files_hold(
    family: str,
    layers: Any,
    biased: bool,
    tied: bool,
    dtype: torch.dtype,
    rank: int,
    adapted: set[str],
    hidden: int,
    skeleton: bool,
) -> None:
    channels, kept, precision = layers
    paths = FAMILIES[family].projections
    targets = tuple(sorted({paths.get(name, paths["up"]).rpartition(".")[2] for name in adapted}))
    sizes = {"hidden_size": hidden, "intermediate_size": channels, "tie_word_embeddings": tied}
    changes = sizes | (BIASES[family] if biased else {})
    plan = planned(tiny_config(family, **changes), kept, precision)
    unpriced = build_skeleton(tiny_config(family, **changes)) if skeleton else tiny_model(family, **changes)
    priced = price(unpriced.to(dtype), plan, rank=rank, targets=targets)
    with tempfile.TemporaryDirectory() as folder:
        base, adapters = write(Path(folder) / "model", tiny_model(family, **changes).to(dtype), plan, rank, targets)
    assert (priced.units + priced.rest, priced.adapters, priced.total) == (base, adapters, base + adapters)
    assert priced.average_bits == average_bits(plan, dtype.itemsize)


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_every_format_costs_what_its_file_holds(tmp_path: Path, precision: Precision) -> None:
    plan = planned(tiny_config("llama"), KEPT, uniform(precision))
    base, adapters = write(tmp_path / "model", tiny_model("llama"), plan, 2, TARGETS)
    priced = price(tiny_model("llama"), plan, rank=2, targets=TARGETS)
    assert (priced.total - priced.adapters, priced.adapters) == (base, adapters)


@each_of(PLAIN)
@pytest.mark.parametrize("tied", [True, False])
def test_a_skeleton_costs_the_same_and_stays_without_weights(family: str, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied, **BIASES[family]}
    skeleton = build_skeleton(tiny_config(family, **changes))
    plan = planned(tiny_config(family, **changes), KEPT, uniform(NF4))
    priced = price(skeleton, plan, rank=2, targets=TARGETS)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert priced == price(tiny_model(family, **changes), plan, rank=2, targets=TARGETS)
    assert price(build_skeleton(tiny_config(family, **changes)), plan).adapters == 0


def test_pricing_leaves_kept_weights_as_they_are() -> None:
    """Narrowed and no more: the rows that stay are those of the dense model, in float32."""
    model, dense = tiny_model("qwen2"), tiny_model("qwen2")
    price(model, planned(model.config, KEPT, uniform(NF4)))
    for layer, whole, (_, channels) in zip(model.model.layers, dense.model.layers, KEPT, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, whole.mlp.up_proj.weight[list(channels)])
    assert torch.equal(model.model.embed_tokens.weight, dense.model.embed_tokens.weight)


@pytest.mark.parametrize(("dtype", "dense_bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_average_bits_by_hand(dtype: torch.dtype, dense_bits: int) -> None:
    """One unit in each number format; a llama of 64 wide with heads of 16 and two query heads to a group."""
    channels = 37
    kept = [([0, 1, 2], range(channels))] * LAYERS
    units = {"qkv": NF4, "o": INT8, "gate_up": DENSE, "down": NF4}
    q, k, o, gate, down = 96 * 64, 48 * 64, 64 * 96, channels * 64, 64 * channels
    bits = (
        (q + 2 * k) * 4  # 64 to a scale
        + (q + 2 * k) // 64 * 32
        + o * 8
        + 64 * 32  # a scale for each row
        + 2 * gate * dense_bits
        + down * 4
        + down // 64 * 32
    )
    weights = q + 2 * k + o + 2 * gate + down
    plan = planned(tiny_config("llama"), kept, [units] * LAYERS)
    priced = price(tiny_model("llama", attention_bias=True, mlp_bias=True).to(dtype), plan)
    assert priced.weights == LAYERS * weights and 8 * priced.unit_weight_bytes == LAYERS * bits
    assert priced.average_bits == average_bits(plan, dtype.itemsize) == pytest.approx(bits / weights)
    biases = (96 + 48 + 48 + 64 + 2 * channels + 64) * dtype.itemsize
    assert priced.units - priced.unit_weight_bytes == LAYERS * biases


def test_nf4_and_int8_alone_by_hand() -> None:
    """4 + 32 / 64 = 4.5 bits; 8 and 32 for each row."""
    kept = [([0, 1, 2, 3], range(FFN))] * LAYERS
    nf4, int8 = (planned(tiny_config("llama"), kept, uniform(one)) for one in (NF4, INT8))
    assert EXPLICIT["llama"]["head_dim"] == 16
    assert average_bits(nf4, 4) == average_bits(nf4, 2) == 4.5
    rows, weights = 128 + 64 + 64 + 64 + 48 + 48 + 64, 2 * 128 * 64 + 2 * 64 * 64 + 3 * 48 * 64
    assert average_bits(int8, 4) == pytest.approx(8 + 32 * rows / weights)
