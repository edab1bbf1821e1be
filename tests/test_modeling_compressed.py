"""Compressed folders by transformers alone: every family, every number format, nothing of qpruner importable."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from support.families import FAMILIES, KEPT_EXPERTS, MIXTURES, QUICK, each_of, logits_of, random_tokens
from support.quantized import CPU, pruned
from support.shared import filled_once
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qpruner.model_folder import load_base, save_base
from qpruner.modeling_compressed import CompressedEmbedding, CompressedLinear, PackedTable, config_class
from qpruner.plan import DENSE, UNITS, Precision
from qpruner.precision import Leading
from qpruner.quantization.apply import quantize_
from qpruner.quantization.packed import PackedLinear
from qpruner.remote_code import load_by_transformers

TWO, ONE = Precision("affine-double", 2, 32), Precision("affine", 1, -1)
LED = Precision("affine-double", 3, 32, Leading(6, Precision("int8", 8)))
LAYERS = [
    (TWO, Precision("symmetric", 4, 32), DENSE, LED),
    (Precision("nf4-double", 4, 64), Precision("int8", 8), Precision("affine", 3, 32), ONE),
    (
        Precision("fp4", 4, 64),
        Precision("symmetric-double", 5, 32),
        Precision("affine", 8, 128),
        Precision("affine-double", 6, 64),
    ),
]
KEPT = [((0, 2, 3), tuple(range(35))), ((1,), tuple(range(3, 48, 2))), ((0, 1, 2, 3), tuple(range(7)))]
TABLE = Precision("affine", 4, 32)
SCRIPT = Path(__file__).parent / "support/without_qpruner.py"


def write(folder: Path, family: str, *, tables: Precision = DENSE, layers: Any = LAYERS, kept: Any = None) -> Any:
    """A compressed folder, and the model that was written there."""
    if family in MIXTURES:  # whose down has one precision, as experts keep different channels
        layers = [[replace(precision, leading=None) for precision in precisions] for precisions in layers]
    kept = kept or (KEPT_EXPERTS if family in MIXTURES else KEPT)
    model, plan = pruned(family, [dict(zip(UNITS, precisions, strict=True)) for precisions in layers], kept)
    plan = replace(plan, embedding=tables, head=tables)
    quantize_(model, plan, None, device=CPU)
    save_base(folder, model, plan, base_name="dense", tokenizer=None)
    return load_base(folder).network


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What a process without qpruner says of a family's folder; one for all that are quick, one for the rest."""

    def result(of: str) -> dict[str, Any]:
        families = [family for family in FAMILIES if (family in QUICK) == (of in QUICK)]

        def fill(root: Path) -> None:
            for number, family in enumerate(families):
                network = write(root / family, family, tables=(DENSE, TABLE)[number % 2])
                inputs = {"tokens": random_tokens(), "logits": logits_of(network).contiguous()}
                save_file(inputs, root / family / "inputs.safetensors")
            command = [sys.executable, str(SCRIPT), str(root)]
            modules = str(root.with_name(f"{root.name}_modules"))
            environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
            assert done.returncode == 0, done.stderr[-2000:]

        folder = filled_once(tmp_path_factory, f"without_qpruner_with_{families[0]}", fill)
        return json.loads((folder / "results.json").read_text())[of]

    return result


@each_of(FAMILIES)
def test_transformers_alone_loads_a_folder(tried: Callable[[str], dict[str, Any]], family: str) -> None:
    result = tried(family)
    assert result["class"] == f"Compressed{FAMILIES[family].model_class}"
    assert result["told"] == {}
    assert [result[name] for name in ("identical", "copied", "saved again", "body")] == [True] * 4
    assert result["eager"] < 2e-5
    assert result["dtype"] == ["torch.float32", "torch.bfloat16", "torch.bfloat16"]
    kept = {"torch.uint8", "torch.int8", "torch.float16", "torch.float32", "torch.bfloat16"}
    assert set(result["codes"]) == kept  # of codes, scales and what is dense


@each_of(FAMILIES)
def test_it_generates_the_same_with_and_without_a_cache(tried: Callable[[str], dict[str, Any]], family: str) -> None:
    assert [tried(family)[name] for name in ("greedy", "beams", "static")] == [True] * 3


@pytest.mark.parametrize("precision", [precision for layer in LAYERS for precision in layer], ids=str)
def test_every_format_means_the_same_without_qpruner(tmp_path: Path, precision: Precision) -> None:
    network = write(tmp_path / "model", "qwen2", layers=[[precision] * 4] * 3, tables=TABLE)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    assert torch.equal(logits_of(loaded), logits_of(network))
    packed = [module for module in loaded.modules() if isinstance(module, torch.nn.Linear) and module.bias is not None]
    assert len(packed) == 9  # q, k and v


def test_equal_widths_stay_in_the_usual_fields(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", kept=[((0, 1, 2), tuple(range(40)))] * 3)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (6, 3, 40)
    assert "per_layer_config" not in config
    assert config["compression"]["modules"]["model.layers.0.self_attn.o_proj"] == {
        "shape": [64, 96],
        "format": "symmetric",
        "bits": 4,
        "group": 32,
    }
    assert "model.layers.0.mlp.gate_proj" not in config["compression"]["modules"]  # dense, of the usual width


def test_a_folder_that_transformers_builds_has_no_code(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", layers=[[DENSE] * 4] * 3, kept=[((0, 1, 2), tuple(range(40)))] * 3)
    assert not (tmp_path / "model/modeling_compressed.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")).__name__ == "MistralForCausalLM"


@pytest.mark.slow  # a process of its own, as these classes stay registered
def test_classes_of_qpruner_need_no_trust(tmp_path: Path) -> None:
    network = write(tmp_path / "model", "gemma2", tables=TABLE)
    script = (
        "import sys, torch, qpruner.auto_classes\n"
        "from transformers import AutoModelForCausalLM\n"
        "from support.families import logits_of\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model).__module__ == 'qpruner.modeling_compressed'\n"
        "torch.save(logits_of(model), sys.argv[2])\n"
        "model.save_pretrained(sys.argv[3])\n"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path / name) for name in ("model", "logits.pt", "again"))]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(network))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(logits_of(again), logits_of(network))


def test_other_engines_can_put_in_their_attention(tmp_path: Path) -> None:
    """As the backend of vLLM for transformers does, which also needs linears that are no more than that."""
    network = write(tmp_path / "model", "llama", layers=[[DENSE] * 4] * 3)
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    calls: list[tuple[int, int]] = []

    def recorded(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        calls.append((query.shape[1], key.shape[1]))
        return sdpa_attention_forward(module, query, key, *rest, **options)

    AttentionInterface.register("recorded", recorded)
    AttentionMaskInterface.register("recorded", sdpa_mask)
    options = {"trust_remote_code": True, "attn_implementation": "recorded"}
    body = AutoModel.from_pretrained(tmp_path / "model", **options)
    assert {type(module) for module in body.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    assert body._supports_attention_backend
    with torch.no_grad():
        states = body(input_ids=random_tokens(), use_cache=False).last_hidden_state
        expected = network.model(input_ids=random_tokens(), use_cache=False).last_hidden_state
    torch.testing.assert_close(states, expected)
    assert calls == [(6, 3), (2, 1), (8, 4)]  # query and key heads of each layer


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_what_qpruner_loads_is_of_the_classes_of_the_file(tmp_path: Path, family: str) -> None:
    network = write(tmp_path / "model", family, tables=TABLE)
    loaded = load_by_transformers(tmp_path / "model")
    ours, files = (dict(one.named_modules()) for one in (network, loaded))
    kinds = (CompressedLinear, PackedTable, CompressedEmbedding)
    packed = {name for name, module in ours.items() if isinstance(module, kinds)}
    assert packed == {name for name, module in files.items() if isinstance(module, kinds)} and len(packed) > 20
    for name in packed:
        one, other = ours[name], files[name]
        assert isinstance(one, type(other))
        if isinstance(one, CompressedEmbedding):
            assert one.scale == other.scale and torch.equal(one(random_tokens()), other(random_tokens()))
            assert one.table.state_dict().keys() == other.table.state_dict().keys()
            continue
        assert one.packed().keys() == other.packed().keys() and one.dtype == other.dtype
        assert all(torch.equal(tensor, other.packed()[part]) for part, tensor in one.packed().items())
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(one.unpack(dtype), other.unpack(dtype))
            places = torch.tensor([one.out_features - 1, 0])
            assert torch.equal(one.rows(places, dtype), one.unpack(dtype)[places])
    linears = [module for module in ours.values() if isinstance(module, PackedLinear)]
    assert linears and all(isinstance(module, CompressedLinear) for module in linears)


def test_a_weight_that_is_assigned_makes_a_linear_dense(tmp_path: Path) -> None:
    write(tmp_path / "model", "qwen2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).bfloat16()
    first, second = (model.model.layers[0].self_attn.get_submodule(name) for name in ("q_proj", "k_proj"))
    names, bias, given = set(first.state_dict()), first.bias, torch.nn.Parameter(torch.randn(first.weight.shape))
    first.weight = given
    assert type(first) is torch.nn.Linear and "codes" in names and set(first.state_dict()) == {"weight", "bias"}
    assert torch.equal(first.weight, given.bfloat16()) and first.bias is bias and not first.weight.requires_grad
    expected = second.unpack(torch.float32).bfloat16()
    assert second.become_dense_() is second and torch.equal(second.weight, expected)
    assert vars(second).keys() - vars(torch.nn.Linear(1, 1)).keys() == {"_is_hf_initialized"}  # of transformers


def adapted(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, lora).eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("tables", [DENSE, TABLE], ids=str)
def test_peft_merges_adapters_into_dense_weights(tmp_path: Path, family: str, tables: Precision) -> None:
    write(tmp_path / "model", family, tables=tables)
    model = adapted(tmp_path / "model")
    assert {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules} & {"table", "lm_head"} == (
        set()
    )
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert (logits_of(merged) - expected).abs().max() < 1e-4 * expected.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert torch.equal(logits_of(again), logits_of(merged))
    assert not any(isinstance(module, CompressedLinear) for module in again.modules())


def test_what_peft_writes_to_a_weight_that_it_has_read_is_kept(tmp_path: Path) -> None:
    """OLoRA takes its factors out of the weight, so that the sum stays as it was."""
    network = write(tmp_path / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="olora")
    difference = logits_of(peft.get_peft_model(model, lora).eval()) - logits_of(network)
    assert difference.abs().max() < 1e-4


def test_a_packed_embedding_cannot_be_written_to(tmp_path: Path) -> None:
    network = write(tmp_path / "model", "llama", tables=TABLE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    with pytest.raises(TypeError, match="The embedding of this model is packed"):
        model.get_input_embeddings().weight.data.zero_()
    assert torch.equal(logits_of(model), logits_of(network))


def test_a_body_is_saved_as_what_it_has_become(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", tables=TABLE)
    body = AutoModel.from_pretrained(tmp_path / "model", trust_remote_code=True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    merged = peft.get_peft_model(body, lora).merge_and_unload()
    merged.save_pretrained(tmp_path / "body")
    again = AutoModel.from_pretrained(tmp_path / "body", trust_remote_code=True)
    with torch.no_grad():
        states = [one(input_ids=random_tokens(), use_cache=False).last_hidden_state for one in (merged, again)]
    assert torch.equal(*states)


@pytest.mark.parametrize(
    "table", [Precision("nf4", 4, 64), Precision("fp4-double", 4, 32), Precision("nf4", 4, 128), TABLE], ids=str
)
def test_rows_of_a_packed_embedding_are_those_of_its_table(tmp_path: Path, table: Precision) -> None:
    write(tmp_path / "model", "llama", tables=table)  # 64 columns: a block, two, and half of one
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    embedding = model.get_input_embeddings()
    assert torch.equal(embedding(random_tokens()), embedding.table.unpack(torch.float32)[random_tokens()])


def test_what_is_packed_is_frozen(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", tables=TABLE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    trains = {name.rpartition(".")[2] for name, part in model.named_parameters() if part.requires_grad}
    assert trains == {"weight"}  # of norms and dense linears


def test_gradients_pass_to_adapters_below(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama")
    model = adapted(tmp_path / "model")
    model(input_ids=random_tokens(), use_cache=False).logits.logsumexp(-1).mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7 * 3
    assert all(parameter.grad.abs().max() > 0 for parameter in trained)


def test_casts_of_a_model_leave_codes_and_scales(tmp_path: Path) -> None:
    write(tmp_path / "model", "llama", tables=TABLE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
    before = {name: part.dtype for name, part in model.named_parameters() if "codes" in name or "scale" in name}
    model.to(torch.bfloat16)
    assert {name: part.dtype for name, part in model.named_parameters() if name in before} == before
    assert (model.dtype, model.model.embed_tokens(random_tokens()).dtype) == (torch.bfloat16, torch.bfloat16)
    linear = model.model.layers[0].self_attn.q_proj
    assert linear.weight.dtype == torch.bfloat16
    assert torch.equal(linear.weight, linear.unpack(torch.float32).bfloat16())


def test_the_configuration_class_allows_any_number_of_heads() -> None:
    config = config_class("LlamaConfig")(hidden_size=64, num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    assert config.model_type == "compressed_llama"
