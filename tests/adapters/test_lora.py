"""Which linears get adapters, by names, patterns and ``all-linear``."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from support.families import PLAIN, adapted, logits_of, tiny_model

from qpruner.adapters.lora import LoRAConfig, adapters_of, attach_adapters, is_target, target_linears
from qpruner.anatomy import architecture_of, unit_linears
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.pricing import price
from qpruner.quantization.apply import LoftQSettings, quantize_

CHOICES: list[Any] = [
    "all-linear",
    "All-Linear",
    r".*\.(q|v)_proj",
    r"model\.layers\.[02]\.mlp\.up_proj",
    ["q_proj", "down_proj"],
    ["mlp.up_proj", "model.layers.1.self_attn.o_proj"],
    ["q_proj", "lm_head"],
]


def wrapped(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("targets", CHOICES, ids=str)
def test_adapters_are_where_peft_alone_would_put_them(targets: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    chosen = target_linears(model, targets)
    assert wrapped(attach_adapters(model, LoRAConfig(r=2, target_modules=targets), seed=0).get_base_model()) == chosen
    plain = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(tiny_model("llama", tie_word_embeddings=False), plain)
    assert wrapped(theirs.get_base_model()) == chosen


@pytest.mark.parametrize("family", PLAIN)
def test_without_the_option_every_projection_of_every_family_has_one(family: str) -> None:
    model = tiny_model(family)
    linears = {name for units in unit_linears(model) for names in units.values() for name in names}
    assert set(wrapped(attach_adapters(model, LoRAConfig(r=2), seed=0).get_base_model())) == linears
    with pytest.raises(UserError, match="query_key_value match no linear of .*(down_proj|c_proj)"):
        attach_adapters(tiny_model(family), LoRAConfig(r=2, target_modules=["query_key_value"]), seed=0)


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.1\..*_proj"], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_loftq_prices_and_packed_tables_agree_on_the_linears(targets: str, tied: bool) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    dense = CompressionPlan.dense(architecture_of(model.config), None)
    packed = Precision("int8", 8)
    plan = dense.with_precision([dict.fromkeys(UNITS, packed)] * len(dense.layers), embedding=packed, head=packed)
    lora = LoRAConfig(r=4, target_modules=targets)
    expected = [
        name
        for units in unit_linears(model)
        for names in units.values()
        for name in names
        if targets == "all-linear" or "layers.1" in name
    ]
    priced = price(tiny_model("llama", tie_word_embeddings=tied), plan, rank=lora.r, targets=lora.target_modules)
    factors = quantize_(model, plan, LoftQSettings.of(lora, 1, 0), device=torch.device("cpu"))
    assert sorted(factors) == sorted(expected)
    model = attach_adapters(model, lora, seed=0)
    assert sorted(wrapped(model.get_base_model())) == sorted(expected)
    assert priced.adapters == sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "query"], r"LoRA target\(s\) query match no linear of LlamaForCausalLM, which has down_proj, "),
        (r".*\.query", r"LoRA target\(s\) \.\*\\\.query match no linear"),
        ("proj", "proj match no linear"),  # the whole of a name
        ("q_proj", r"'q_proj' is taken as a regular expression .* as a list: \[q_proj\]"),
        ("self_attn.q_proj, up_proj", r"as a list: \[self_attn.q_proj, up_proj\]"),
        ([], r"target_modules is \(\), and so names nothing"),
        ("", "target_modules is '', and so names nothing"),
        (" ", "target_modules is ' ', and so names nothing"),
        (["q_proj", ""], "names nothing"),
        (r".*\.mlp\.?.*", r"matches model.layers.0.mlp, which is no linear"),
        (r"model\.embed_tokens|.*q_proj", "matches model.embed_tokens, which is no linear"),
    ],
)
def test_targets_that_match_nothing_or_no_linear_are_refused(targets: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        attach_adapters(tiny_model("llama"), LoRAConfig(target_modules=targets), seed=0)


def test_a_broken_pattern_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"'\*proj', which is no regular expression"):
        LoRAConfig(target_modules="*proj")


def test_ends_of_names_are_whole_parts() -> None:
    assert is_target("model.layers.0.mlp.up_proj", ["up_proj"]) and is_target("up_proj", ["up_proj"])
    assert not is_target("model.layers.0.mlp.up_proj", ["p_proj"])


def test_an_adapter_of_another_rank_is_scaled_as_the_others() -> None:
    ranks = {"model.layers.1.mlp.up_proj": 5, "model.layers.2.self_attn.q_proj": 1}
    model = attach_adapters(tiny_model("llama"), LoRAConfig(r=2, alpha=6.0), seed=0, ranks=ranks)
    adapters = adapters_of(model)
    assert {name: len(adapter.lora_A) for name, adapter in adapters.items()} == dict.fromkeys(adapters, 2) | ranks
    assert {adapter.scale for adapter in adapters.values()} == {3.0}
    # Not those of layer 11 and the like, and of no matter where all have one rank.
    assert len(adapters["model.layers.1.mlp.gate_proj"].lora_A) == 2
    plain = attach_adapters(tiny_model("llama"), LoRAConfig(r=2, alpha=6.0), seed=0).peft_config["default"]
    assert (plain.rank_pattern, plain.alpha_pattern) == ({}, {})


@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_adapters_that_are_more_than_two_factors_are_refused(kind: str) -> None:
    config = peft.LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM", **{kind: True})
    model = peft.get_peft_model(tiny_model("olmo2" if kind == "use_dora" else "qwen2"), config)
    with pytest.raises(UserError, match="DoraLinearVariant" if kind == "use_dora" else "LoRA with biases"):
        adapters_of(model)


def test_adapters_on_a_tied_head_stay_on_the_head_when_merged() -> None:
    from qpruner.quantization.merging import merge_

    model = adapted(tiny_model("llama", tie_word_embeddings=True), target_modules=["q_proj", "lm_head"])
    expected = logits_of(model)
    merged = merge_(model, torch.float32)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    assert not merged.config.tie_word_embeddings


@pytest.mark.parametrize("given", ["command", "file"])
def test_a_run_takes_a_pattern_and_goes_on_with_it(
    tiny_llama: Path, tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = "all-linear" if given == "command" else r".*\.[qv]_proj"
    config = {"model": {"base": str(tiny_llama), "lora": {"r": 2, "target_modules": targets}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config if given == "file" else {}))
    options = {
        "model.base": tiny_llama,
        **({"model.lora.r": 2, "model.lora.target_modules": targets} if given == "command" else {}),
        "run.name": "x",
        "run.dir": tmp_path,
        "data": "StoriesDataModule",
        **{"data.num_train": 24, "data.num_validation": 2, "data.num_test": 2, "data.num_choices": 0},
        "data.max_length": 24,
        "trainer.callbacks+": "MixedPrecisionQuantization",
        "trainer.callbacks.bits": "[4, 8]",
        **{"trainer.accelerator": "cpu", "trainer.max_steps": 2},
        **{"trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false"},
    }
    command = ["fit", f"--config={tmp_path / 'config.yaml'}", *(f"--{name}={value}" for name, value in options.items())]
    run(command)
    run(command)  # the same options
    stored = yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["model"]["lora"]["target_modules"]
    adapters = (tmp_path / "x" / "model" / "adapter" / "adapter_config.json").read_text()
    assert stored == targets and ("gate_proj" in adapters) == (given == "command")
    checkpoint = torch.load(tmp_path / "x" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["lora"]["target_modules"] == targets
    with pytest.raises(UserError, match="match no linear"):
        run([*command, "--run.name=y", r"--model.lora.target_modules=.*\.query"])
    assert not (tmp_path / "y" / "model").exists()
    with pytest.raises(UserError, match="no regular expression"):
        run([*command, "--run.name=y", "--model.lora.target_modules=*proj"])
