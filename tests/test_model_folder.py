import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import environment
from support.families import KEPT, PLAIN, each_of, logits_of, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import qpruner
from qpruner import model_folder
from qpruner.adapter_files import has_adapters, save_adapters
from qpruner.adapters.lora import LoRAConfig, attach_adapters
from qpruner.anatomy import architecture_of
from qpruner.conv1d import conv1d_to_linear_
from qpruner.errors import UserError
from qpruner.folder_manifest import is_compressed
from qpruner.model_folder import load_base, load_compressed, read_config, rehearse_saving, save_base
from qpruner.plan import UNITS, CompressionPlan, Precision
from qpruner.pretrained import EMBEDDED, load_config, load_tokenizer, save_tokenizer
from qpruner.pruning.surgery import apply_pruning_, stated_by_weights
from qpruner.quantization.apply import quantize_

SHAPES = {"unequal": KEPT, "three groups": [((0, 1, 3), range(40))] * 3, "two groups": [((0, 3), range(9, 40))] * 3}
"""Layers that differ, and equal ones with 6 and with 4 heads; some configurations refuse 6: 64 is no multiple."""


def compress(family: str, kept: Any = KEPT, model: Any = None) -> tuple[Any, CompressionPlan]:
    model = model or tiny_model(family)
    plan = CompressionPlan.dense(architecture_of(model.config), "ab12").keeping(kept)
    apply_pruning_(model, plan)
    return model, plan


def write(folder: Path, family: str = "llama", kept: Any = KEPT) -> tuple[Any, CompressionPlan]:
    model, plan = compress(family, kept)
    save_base(folder, model, plan, base_name="models/dense", tokenizer=None)
    return model, plan


def with_adapters(model: Any) -> Any:
    """Adapters of rank 2 that have an effect, in evaluation mode."""
    adapted = attach_adapters(model, LoRAConfig(r=2, dropout=0.5), seed=5)
    generator = torch.Generator().manual_seed(6)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return adapted.eval()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text())


def list_files(folder: Path) -> dict[str, Any]:
    """Sizes and hashes as the manifest should have them."""
    return {
        path.relative_to(folder).as_posix(): {"size": len(data := path.read_bytes()), "sha256": digest(data)}
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def edit_manifest(folder: Path, change: Callable[[Any], Any]) -> None:
    manifest = read_manifest(folder)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def state(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, message: str) -> None:
    for load in (load_base, load_compressed):
        with pytest.raises(UserError, match=re.escape(message)):
            load(folder)


def with_templates(folder: Path) -> Any:
    """A tokenizer with a second chat template, which is saved in a folder of its own."""
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


# What was saved comes back.


def test_folders_beside_the_weights_are_listed_and_checked(tmp_path: Path) -> None:
    model, plan = compress("llama")
    folder = tmp_path / "model"
    save_base(folder, model, plan, base_name="models/dense", tokenizer=with_templates(tmp_path / "tokenizer"))
    save_adapters(folder, with_adapters(model), trained=True)
    assert read_manifest(folder)["files"] == list_files(folder)
    template = folder / "additional_chat_templates" / "tool_use.jinja"
    assert load_tokenizer(str(folder)).chat_template["tool_use"] == template.read_text() == "{{ tools }}"
    load_compressed(folder)
    template.write_text("{{ altered }}")
    refused(folder, f"{str(template)!r} has 13 bytes instead of 11")
    template.unlink()
    refused(folder, f"{str(template)!r} is missing")


# What cannot be saved is found before.


def test_what_can_be_saved_passes_the_rehearsal_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    before = state(tiny_llama)
    rehearse_saving(str(tiny_llama), load_config(str(tiny_llama)), with_templates(tmp_path))
    (tmp_path / "sampled").mkdir()
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "sampled" / name).write_bytes((tiny_llama / name).read_bytes())
    # What transformers only warns of, it saves again.
    (tmp_path / "sampled" / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": false}')
    rehearse_saving(str(tmp_path / "sampled"), load_config(str(tmp_path / "sampled")), load_tokenizer(EMBEDDED))
    (tmp_path / "sampled" / "generation_config.json").unlink()
    rehearse_saving(str(tmp_path / "sampled"), load_config(str(tmp_path / "sampled")), load_tokenizer(EMBEDDED))
    assert state(tiny_llama) == before


@pytest.mark.parametrize("content", ['{"temp', "[]", "7", '{"max_new_tokens": 0}', '{"cache_implementation": "x"}'])
def test_a_generation_config_that_cannot_be_used_is_refused(tiny_llama: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="The generation_config.json of .* cannot be used .*Mend that file, or delete"):
        rehearse_saving(str(tmp_path), load_config(str(tmp_path)), load_tokenizer(EMBEDDED))


def test_a_tokenizer_that_cannot_be_saved_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(EMBEDDED)

    def refuse(folder: str) -> None:
        raise NotImplementedError("not this one")

    monkeypatch.setattr(tokenizer, "save_pretrained", refuse)
    message = f"The tokenizer of {str(tiny_llama)!r} cannot be saved beside a compressed model (NotImplementedError: "
    with pytest.raises(UserError, match=re.escape(message)):
        rehearse_saving(str(tiny_llama), load_config(str(tiny_llama)), tokenizer)


def test_a_tokenizer_that_cannot_be_loaded_again_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda folder: (folder / "tokenizer.json").write_text("{}"))
    message = f"The tokenizer of {str(tiny_llama)!r} cannot be saved beside a compressed model (UserError: Cannot load"
    with pytest.raises(UserError, match=re.escape(message)):
        rehearse_saving(str(tiny_llama), load_config(str(tiny_llama)), tokenizer)


@pytest.mark.parametrize(("fast", "saved"), [(True, [None, "my.Tok"]), (False, ["my.Tok", None])])
def test_code_of_a_tokenizer_is_named_as_transformers_reads_it(tmp_path: Path, fast: bool, saved: Any) -> None:
    def save_pretrained(folder: Path) -> None:  # as transformers does
        (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "my.Tok"}, "x": 1}')

    save_tokenizer(SimpleNamespace(save_pretrained=save_pretrained, is_fast=fast), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "auto_map": {"AutoTokenizer": saved},
        "x": 1,
    }


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kept", [None, SHAPES["three groups"], SHAPES["two groups"]], ids=["all", "three", "two"])
@pytest.mark.parametrize("packed", [False, True])
def test_adapters_that_peft_merged_leave_a_model_for_everybody(
    tmp_path: Path, family: str, kept: Any, packed: bool
) -> None:
    if family == "gemma2" and kept == SHAPES["three groups"]:
        pytest.skip("transformers has no configuration for it")
    model, plan = compress(family, kept or [(range(4), range(48))] * 3)
    if packed:
        plan = plan.with_precision([dict.fromkeys(UNITS, Precision("int8", 8))] * 3)
        quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    save_adapters(tmp_path / "model", with_adapters(model), trained=True)
    merged = load_compressed(tmp_path / "model").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again), logits_of(merged))
    assert read_config(tmp_path / "merged").architectures == [type(again).__name__]


@each_of(PLAIN)
@pytest.mark.parametrize("kept", SHAPES.values(), ids=list(SHAPES))
def test_the_model_comes_back_with_identical_logits(tmp_path: Path, family: str, kept: Any) -> None:
    model, plan = write(tmp_path / "model", family, kept)
    expected = logits_of(model)
    loaded = load_base(tmp_path / "model")
    assert torch.equal(logits_of(loaded.network), expected)
    assert torch.equal(logits_of(load_compressed(str(tmp_path / "model"))), expected)
    assert (loaded.plan, loaded.base_name, loaded.base_sha256) == (plan, "models/dense", "ab12")
    assert stated_by_weights(loaded.network) == architecture_of(loaded.network.config)
    assert architecture_of(read_config(tmp_path / "model")) == architecture_of(loaded.network.config)
    as_mistral = family == "llama" and kept == SHAPES["three groups"]  # what transformers can load
    expected_family = "mistral" if as_mistral else family
    assert architecture_of(loaded.network.config) == replace(plan.widths, model_type=expected_family)


@pytest.mark.parametrize("kept", SHAPES.values(), ids=list(SHAPES))
def test_biases_of_every_projection_come_back(tmp_path: Path, kept: Any) -> None:
    model, plan = compress("llama", kept, model=tiny_model("llama", attention_bias=True, mlp_bias=True))
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    loaded = load_compressed(tmp_path / "model")
    assert loaded.model.layers[1].mlp.down_proj.bias.abs().max() > 0
    assert torch.equal(logits_of(loaded), logits_of(model))


@each_of(PLAIN)
def test_a_loaded_model_is_frozen_in_evaluation_mode_and_on_the_cpu(tmp_path: Path, family: str) -> None:
    write(tmp_path / "model", family)
    model = load_base(tmp_path / "model").network
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == tiny_config(family).tie_word_embeddings


@each_of(PLAIN)
def test_a_loaded_model_generates_the_same(tmp_path: Path, family: str) -> None:
    model, plan = compress(family)
    model.generation_config.eos_token_id = [3, 4]
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    loaded = load_compressed(tmp_path / "model")
    assert loaded.generation_config.eos_token_id == [3, 4]
    tokens = torch.tensor([[7, 8, 9]])
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(tokens, **options), model.generate(tokens, **options))


@each_of(PLAIN)
@pytest.mark.parametrize("kept", SHAPES.values(), ids=list(SHAPES))
def test_saving_what_was_loaded_writes_the_same_files(tmp_path: Path, family: str, kept: Any) -> None:
    write(tmp_path / "first", family, kept)
    loaded = load_base(tmp_path / "first")
    save_base(tmp_path / "second", loaded.network, loaded.plan, base_name=loaded.base_name, tokenizer=None)
    first, second = list_files(tmp_path / "first"), list_files(tmp_path / "second")
    assert "model.safetensors" in first
    for files in (first, second):  # the last bits of these depend on where tensors lie in memory
        assert files.pop("reference/logits.safetensors")
    assert second == first


@each_of(PLAIN)
def test_bfloat16_is_kept(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path / "dense")
    dense = conv1d_to_linear_(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))
    model, plan = compress(family, model=dense)
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in load_file(tmp_path / "model/model.safetensors").values()} == {torch.bfloat16}
    loaded = load_compressed(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("kept", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_configuration_states_the_dtype_of_the_weights(tmp_path: Path, kept: Any, dtype: str) -> None:
    model, plan = compress("llama", kept, model=tiny_model("llama").to(getattr(torch, dtype)))
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == dtype


def test_weights_in_several_files_come_back(tmp_path: Path) -> None:
    model, plan = compress("gemma2")
    expected = logits_of(model)
    model.save_pretrained = partial(model.save_pretrained, max_shard_size="100KB")
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert "model.safetensors.index.json" in read_manifest(tmp_path / "model")["files"]
    assert torch.equal(logits_of(load_compressed(tmp_path / "model")), expected)


@each_of(PLAIN)
@pytest.mark.parametrize("kept", [KEPT, SHAPES["three groups"]], ids=["unequal", "three groups"])
def test_adapters_come_back_with_identical_logits(tmp_path: Path, family: str, kept: Any) -> None:
    model, _ = write(tmp_path / "model", family, kept)
    plain = logits_of(model)
    assert not has_adapters(tmp_path / "model")
    adapted = with_adapters(model)
    expected = logits_of(adapted)
    assert (expected - plain).abs().max() > 0.01
    save_adapters(tmp_path / "model", adapted, trained=True)
    assert has_adapters(tmp_path / "model")
    assert torch.equal(logits_of(load_compressed(tmp_path / "model")), expected)
    assert torch.equal(logits_of(load_base(tmp_path / "model").network), plain)
    written = json.loads((tmp_path / "model/adapter/adapter_config.json").read_text())
    assert str(tmp_path / "model") in written["base_model_name_or_path"]


@pytest.mark.parametrize("kept", SHAPES.values(), ids=SHAPES)
def test_peft_alone_finds_the_base_from_anywhere(tmp_path: Path, kept: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = write(Path("made"), "llama", kept)
    adapted = with_adapters(model)
    save_adapters(Path("made"), adapted, trained=True, place=Path("model"))
    Path("made").rename("model")
    monkeypatch.chdir("/")
    folder, expected = tmp_path / "model", logits_of(adapted)
    if kept is KEPT:  # transformers cannot build it
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", trust_remote_code=False)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", trust_remote_code=True)
    assert torch.equal(logits_of(loaded), expected)
    over = peft.PeftModel.from_pretrained(load_base(folder).network, folder / "adapter")
    assert torch.equal(logits_of(over), expected)
    folder.rename(tmp_path / "copied")
    loaded = load_compressed(tmp_path / "copied")
    assert torch.equal(logits_of(loaded), expected)
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "copied")


def test_a_home_folder_is_written_as_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = write(tmp_path / "model")
    adapted = with_adapters(model)
    save_adapters(tmp_path / "model", adapted, trained=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert torch.equal(logits_of(load_compressed("~/model")), logits_of(adapted))


@pytest.mark.slow
def test_a_new_process_computes_identical_logits(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "model", "gemma2")
    adapted = with_adapters(model)
    save_adapters(tmp_path / "model", adapted, trained=True)
    script = (
        "import hashlib, sys, qpruner\n"
        "from support.families import logits_of\n"
        "logits = logits_of(qpruner.load_compressed(sys.argv[1]))\n"
        "print(hashlib.sha256(logits.numpy().tobytes()).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model")],
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == digest(logits_of(adapted).numpy().tobytes())
    assert qpruner.load_compressed is load_compressed


# The folder.


def test_the_manifest_has_the_size_and_hash_of_every_file(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "model")
    base = {"config.json", "generation_config.json", "model.safetensors", "plan.json", "modeling_compressed.py"}
    base |= {"reference/logits.safetensors"}
    manifest = read_manifest(tmp_path / "model")
    assert (manifest["kind"], manifest["version"]) == ("qpruner model", 2)
    assert manifest["base"] == {"name": "models/dense", "sha256": "ab12"}
    assert manifest["files"] == list_files(tmp_path / "model")
    assert manifest["files"].keys() == base
    save_adapters(tmp_path / "model", with_adapters(model), trained=True)
    manifest = read_manifest(tmp_path / "model")
    assert manifest["base"] == {"name": "models/dense", "sha256": "ab12"}
    assert manifest["files"] == list_files(tmp_path / "model")
    assert manifest["files"].keys() == base | {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/reference/logits.safetensors",
    }


def test_the_tokenizer_is_beside_the_model(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model, plan = compress("llama")
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=tokenizer)
    files = read_manifest(tmp_path / "model")["files"]
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys() and files == list_files(tmp_path / "model")
    text = "Tom has a red ball."
    assert AutoTokenizer.from_pretrained(tmp_path / "model")(text).input_ids == tokenizer(text).input_ids


def test_a_folder_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "model")
    assert is_compressed(tmp_path / "model")
    assert not is_compressed(tmp_path) and not is_compressed(tmp_path / "nothing")
    (tmp_path / "model/plan.json").unlink()
    assert not is_compressed(tmp_path / "model")


def test_loading_needs_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = write(tmp_path / "model")
    adapted = with_adapters(model)
    save_adapters(tmp_path / "model", adapted, trained=True)
    kinds = {path.suffix for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".py"}  # the last one for transformers alone

    def unpickled(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, unpickled)
    loaded = load_compressed(tmp_path / "model")
    assert torch.equal(logits_of(loaded), logits_of(adapted))


def test_a_file_that_is_not_listed_is_not_read(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "model")
    expected = logits_of(model)
    bogus = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for name in ("extra.safetensors", "a.safetensors", "zzz.safetensors"):
        save_file(bogus, tmp_path / "model" / name)
    (tmp_path / "model/pytorch_model.bin").write_bytes(b"no pickle")
    (tmp_path / "model/adapter").mkdir()
    (tmp_path / "model/adapter/adapter_config.json").write_text("{}")
    assert torch.equal(logits_of(load_compressed(tmp_path / "model")), expected)


# What is refused.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "plan.json", "generation_config.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    refused(tmp_path / "model", f"{str(tmp_path / 'model' / name)!r} is missing. Copy the whole folder again.")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "plan.json"])
def test_a_cut_file_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / name
    data = path.read_bytes()
    path.write_bytes(data[:-7])
    message = f"{str(path)!r} has {len(data) - 7:,} bytes instead of {len(data):,}: it was cut off or altered."
    refused(tmp_path / "model", message)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "plan.json"])
def test_one_altered_byte_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model" / name
    data = bytearray(path.read_bytes())
    expected = digest(bytes(data))
    data[-9] ^= 1
    path.write_bytes(data)
    refused(tmp_path / "model", f"{str(path)!r} was altered: its SHA-256 is not {expected}. Copy it again.")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_that_are_missing_or_altered_are_refused(tmp_path: Path, name: str) -> None:
    model, _ = write(tmp_path / "model")
    save_adapters(tmp_path / "model", with_adapters(model), trained=True)
    path = tmp_path / "model/adapter" / name
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    refused(tmp_path / "model", f"{str(path)!r} was altered")
    path.unlink()
    refused(tmp_path / "model", f"{str(path)!r} is missing.")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 1}, "kind 'qpruner model', version 1"),
        ({"version": None}, "kind 'qpruner model', version None"),
        ({"kind": "qpruner plan"}, "kind 'qpruner plan', version 2"),
    ],
)
def test_another_kind_or_version_is_refused(tmp_path: Path, change: dict[str, Any], found: str) -> None:
    write(tmp_path / "model")
    edit_manifest(tmp_path / "model", lambda manifest: manifest.update(change))
    path = str(tmp_path / "model/manifest.json")
    refused(tmp_path / "model", f"{path!r} is of {found}; this qpruner reads 'qpruner model', version 2.")


def test_a_folder_without_a_readable_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model")
    message = f"{str(tmp_path / 'model')!r} holds no compressed model: cannot read its manifest.json ("
    (tmp_path / "model/manifest.json").write_text("size: 3")
    refused(tmp_path / "model", message + "Expecting value")
    (tmp_path / "model/manifest.json").write_bytes(b"\xff\xfe")
    refused(tmp_path / "model", message + "'utf-8'")
    (tmp_path / "model/manifest.json").unlink()
    refused(tmp_path / "model", message + "[Errno 2] No such file")
    refused(tmp_path / "nowhere", f"{str(tmp_path / 'nowhere')!r} holds no compressed model")


def relist(folder: Path) -> None:
    """Makes the manifest fit what is in the folder."""
    edit_manifest(folder, lambda manifest: manifest.update(files=list_files(folder)))


def test_weights_that_are_not_those_of_the_configuration_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model")
    path, name = tmp_path / "model/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    tensor = weights.pop(name)
    save_file(weights, path)
    relist(tmp_path / "model")
    whose = f"{str(tmp_path / 'model')!r}: The weights are not those of its configuration:"
    refused(tmp_path / "model", f"{whose} missing {name}, unexpected none.")
    save_file({**weights, name: tensor, "model.layers.9.weight": tensor.clone()}, path)
    relist(tmp_path / "model")
    refused(tmp_path / "model", f"{whose} missing none, unexpected model.layers.9.weight.")
    path.write_bytes(b"no weights")
    relist(tmp_path / "model")
    refused(tmp_path / "model", f"{str(path)!r} is not a safetensors file: ")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        (
            "compressed_gpt_neox",
            "{!r}: It is of a model of type 'compressed_gpt_neox', which this qpruner does not know.",
        ),
        ("gpt_neox", "{!r}: Models of type 'gpt_neox' cannot be pruned; llama, mistral, qwen2, qwen3, gemma, gemma2, "),
    ],
)
def test_a_model_of_an_unknown_type_is_refused(tmp_path: Path, model_type: str, message: str) -> None:
    write(tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps({"model_type": model_type}))
    relist(tmp_path / "model")
    refused(tmp_path / "model", message.format(str(path)))


# Whole or not at all.


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def half_written(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["weights", "plan", "manifest"])
@pytest.mark.parametrize("before", ["nothing", "a model"])
def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, before: str
) -> None:
    if before == "a model":
        write(tmp_path / "model", "llama")
    old = state(tmp_path)
    model, plan = compress("qwen2")
    owner, name, then = {
        "weights": (model, "save_pretrained", half_written),
        "plan": (CompressionPlan, "write", stop),
        "manifest": (model_folder, "write_json", stop),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, then)
        with pytest.raises(KeyboardInterrupt):
            save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert state(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if before == "a model" else [])
    save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert torch.equal(logits_of(load_compressed(tmp_path / "model")), logits_of(model))


def test_a_stop_at_the_last_moment_leaves_the_old_model_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", "llama")
    old, rename = state(tmp_path), os.replace
    model, plan = compress("qwen2")

    def stop_at_the_folder(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "model":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_folder)
    with pytest.raises(KeyboardInterrupt):
        save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert state(tmp_path) in (old, {})
    assert [path.name for path in tmp_path.iterdir()] in (["model"], [])


def test_what_was_in_the_folder_goes(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "model", "llama")
    save_adapters(tmp_path / "model", with_adapters(model), trained=True)
    new, _ = write(tmp_path / "model", "qwen2")
    assert not has_adapters(tmp_path / "model") and not (tmp_path / "model/adapter").exists()
    assert torch.equal(logits_of(load_compressed(tmp_path / "model")), logits_of(new))


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "model")
    path, name = tmp_path / "model/model.safetensors", "model.layers.1.mlp.up_proj.weight"
    weights = load_file(path)
    weights[name] = weights[name][:-1].clone()
    save_file(weights, path)
    relist(tmp_path / "model")
    refused(tmp_path / "model", "are not those of its configuration")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.pop("base"),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest["files"]["config.json"].pop("size"),
        lambda manifest: manifest["files"].pop("config.json"),
        lambda manifest: manifest["files"].pop("plan.json"),
    ],
)
def test_a_manifest_that_lacks_something_is_refused(tmp_path: Path, change: Callable[[Any], Any]) -> None:
    write(tmp_path / "model")
    edit_manifest(tmp_path / "model", change)
    refused(tmp_path / "model", "Copy the folder again")


@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "model")
    (tmp_path / "model/manifest.json").write_text(text)
    refused(tmp_path / "model", "no manifest of a compressed model")


def test_an_unlisted_generation_config_is_not_read(tmp_path: Path) -> None:
    write(tmp_path / "model")
    edit_manifest(tmp_path / "model", lambda manifest: manifest["files"].pop("generation_config.json", None))
    (tmp_path / "model/generation_config.json").write_text("{bad")
    load_base(tmp_path / "model")


def test_a_plan_that_is_not_that_of_the_weights_is_refused(tmp_path: Path) -> None:
    _, plan = write(tmp_path / "model")
    dense = CompressionPlan.dense(plan.architecture, plan.base_sha256)
    dense.write(tmp_path / "model/plan.json")
    relist(tmp_path / "model")
    refused(tmp_path / "model", "is not that of its weights: kv_groups")


def test_a_narrowed_model_can_be_pickled(tmp_path: Path) -> None:
    """Processes that are spawned get their model that way."""
    model, _ = write(tmp_path / "model")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(again), logits_of(model))


def test_adapters_cut_off_while_written_leave_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = write(tmp_path / "model")
    adapted = with_adapters(model)
    save_adapters(tmp_path / "model", adapted, trained=True)
    monkeypatch.setattr("qpruner.adapter_files._write_adapters", stop)
    with pytest.raises(KeyboardInterrupt):
        save_adapters(tmp_path / "model", adapted, trained=True)
    assert type(load_compressed(tmp_path / "model")).__name__ == "LlamaForCausalLM"


def test_an_unlisted_pickle_of_adapters_is_not_read(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "model")
    save_adapters(tmp_path / "model", with_adapters(model), trained=True)
    weights = load_file(tmp_path / "model/adapter/adapter_model.safetensors")
    torch.save(weights, tmp_path / "model/adapter/adapter_model.bin")
    (tmp_path / "model/adapter/adapter_model.safetensors").unlink()
    edit_manifest(tmp_path / "model", lambda manifest: manifest["files"].pop("adapter/adapter_model.safetensors"))
    assert type(load_compressed(tmp_path / "model")).__name__ == "LlamaForCausalLM"  # the base alone


def test_damage_to_the_base_is_not_blessed_by_saving_adapters(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "model")
    adapted = with_adapters(model)
    path = tmp_path / "model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    save_adapters(tmp_path / "model", adapted, trained=True)
    refused(tmp_path / "model", "was altered")


def test_a_base_that_the_disk_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = compress("llama")
    monkeypatch.setattr(model_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="the disk has 10 left"):
        save_base(tmp_path / "model", model, plan, base_name="dense", tokenizer=None)
    assert not (tmp_path / "model").exists()
