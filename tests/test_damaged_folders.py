"""Folders of models whose manifest fits what lies in them, and whose files hold something else than they should."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import KEPT, adapted, logits_of, tiny_model

from qpruner.adapter_files import save_adapters
from qpruner.anatomy import architecture_of
from qpruner.errors import UserError
from qpruner.files import hash_file
from qpruner.model_folder import load_compressed, save_base
from qpruner.plan import CompressionPlan, Precision
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import quantize_

INT8 = Precision("int8", 8)
CONFIG, GENERATION, WEIGHTS, MANIFEST = "config.json", "generation_config.json", "model.safetensors", "manifest.json"
ADAPTER, FACTORS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrowed Llama with packed tables, dense linears and adapters."""
    folder = tmp_path_factory.mktemp("damaged") / "model"
    model = tiny_model("llama")
    plan = CompressionPlan.dense(architecture_of(model.config), "ab12").keeping(KEPT)
    apply_pruning_(model, plan)
    plan = plan.with_precision([layer.precision for layer in plan.layers], embedding=INT8, head=INT8)
    quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(folder, model, plan, base_name="dense", tokenizer=None)
    save_adapters(folder, adapted(model), trained=True)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def relist(folder: Path) -> None:
    """Makes the manifest fit what lies in the folder."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {
        name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for name in manifest["files"]
        if (path := folder / name).is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def edit(name: str, **changes: Any) -> Callable[[Path], Any]:
    def edited(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return edited


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def changed(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / name)

    return changed


def cut_off(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "file", "said"),
    [
        (write(CONFIG, b""), CONFIG, "Expecting value"),
        (write(CONFIG, b"\xff\xfe"), CONFIG, "utf-8"),
        (write(CONFIG, b"[]"), CONFIG, "must be an object"),
        (edit(CONFIG, model_type=3), CONFIG, "model_type must be text, not 3"),
        (edit(CONFIG, num_hidden_layers=10**9), CONFIG, "num_hidden_layers is 1000000000"),
        (edit(CONFIG, num_hidden_layers="3"), CONFIG, "num_hidden_layers must be a whole number"),
        (edit(CONFIG, num_attention_heads=0), CONFIG, ""),
        (edit(CONFIG, num_key_value_heads=[]), CONFIG, ""),
        (edit(CONFIG, hidden_size=-64), CONFIG, ""),
        (edit(CONFIG, rms_norm_eps="x"), CONFIG, "rms_norm_eps"),
        (edit(CONFIG, rope_parameters=[]), CONFIG, ""),
        (edit(CONFIG, hidden_act="nothing"), CONFIG, "nothing"),
        (edit(CONFIG, hidden_size=128), "", "not that of its weights: hidden_size is 64 there and 128 here"),
        (edit(CONFIG, vocab_size=101), "", "[100, 64], but must be torch.int8 [101, 64]"),
        (write(GENERATION, b"{"), GENERATION, "not a valid JSON"),
        (write(GENERATION, b"true"), GENERATION, ""),
        (cut_off(WEIGHTS), WEIGHTS, "is not a safetensors file"),
        (write(WEIGHTS, b""), WEIGHTS, "is not a safetensors file"),
        (tensors(WEIGHTS, lambda held: held.update({Q: held[Q].double()})), "", f"{Q} should be of torch.float32"),
        (tensors(WEIGHTS, lambda held: held.update({Q: held[Q].int()})), "", "not those of its configuration"),
        (tensors(WEIGHTS, lambda held: held.update({Q: held[Q].T})), "", "size mismatch"),
        (tensors(WEIGHTS, lambda held: held.pop(Q)), "", f"missing {Q}, unexpected none"),
        (tensors(WEIGHTS, lambda held: held.clear()), "", "is missing, but must be torch.int8 [100, 64]"),
        (cut_off(FACTORS), FACTORS, "is not a safetensors file"),
        (tensors(FACTORS, lambda held: held.pop(A)), FACTORS, "missing base_model.model.model.layers.0."),
        (tensors(FACTORS, lambda held: held.clear()), FACTORS, "and 39 more, unexpected none"),
        (tensors(FACTORS, lambda held: held.update(x=held[A] + 1)), FACTORS, "unexpected"),
        (tensors(FACTORS, lambda held: held.update({A: held[A][:-1]})), FACTORS, "size mismatch"),
        (tensors(FACTORS, lambda held: held.update({A: held[A].int()})), FACTORS, "floating point, not torch.int32"),
        (write(ADAPTER, b"\xff"), ADAPTER, ""),
        (write(ADAPTER, b"[]"), ADAPTER, ""),
        (edit(ADAPTER, peft_type="IA3"), ADAPTER, "PEFT type <PeftType.IA3: 'IA3'>; a compressed folder holds LORA"),
        (edit(ADAPTER, peft_type="LORA9"), ADAPTER, "LORA9"),
        (edit(ADAPTER, r=-1), ADAPTER, ""),
        (edit(ADAPTER, r=[]), ADAPTER, ""),
        (edit(ADAPTER, r=4), FACTORS, "size mismatch"),
        (edit(ADAPTER, lora_alpha="x"), ADAPTER, ""),
        (edit(ADAPTER, target_modules=["nothing"]), ADAPTER, "nothing"),
        (edit(ADAPTER, modules_to_save="llama"), FACTORS, ""),
        (edit(ADAPTER, trainable_token_indices=[1]), ADAPTER, ""),
        (edit(ADAPTER, target_modules=["q_proj"]), FACTORS, "unexpected"),
    ],
)  # fmt: skip
def test_malformed_content_under_a_manifest_that_fits(
    folder: Path, damage: Callable[[Path], Any], file: str, said: str
) -> None:
    damage(folder)
    relist(folder)
    with pytest.raises(UserError) as error:
        load_compressed(folder)
    message = str(error.value)
    assert repr(str(folder / file)) in message and said in message
    assert message.endswith("Copy the folder again, or run the fit that wrote it again.") and len(message) < 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: files[CONFIG].update(size="3"), "files.config.json.size must be a whole number, not '3'"),
        (lambda files: files[CONFIG].update(size=None), "files.config.json.size must be a whole number, not None"),
        (lambda files: files[CONFIG].update(sha256=3), "files.config.json.sha256 must be text, not 3"),
        (lambda files: files.update({"../x": files[CONFIG]}), "'../x', which lies outside the folder"),
        (lambda files: files.update({"/etc/passwd": files[CONFIG]}), "'/etc/passwd', which lies outside the folder"),
        (lambda files: files.update({"CONFIG.json": files[CONFIG]}), "is missing"),
        (lambda files: files.update({"a\0b": files[CONFIG]}), "is missing"),
        (lambda files: files.update({"\ud800": files[CONFIG]}), "is missing"),
        (lambda files: files.update(adapter=files[CONFIG]), "is no file"),
    ],
)
def test_a_manifest_that_lists_what_cannot_be(folder: Path, change: Callable[[Any], Any], said: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["files"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        load_compressed(folder)
    assert said in str(error.value) and str(folder) in str(error.value) and "Copy" in str(error.value)


def test_a_manifest_of_a_wrong_base_or_of_unknown_adapters_is_refused(folder: Path) -> None:
    for change in ({"base": {"name": "x", "sha256": 1}}, {"adapters": "half"}):
        before = (folder / MANIFEST).read_text()
        edit(MANIFEST, **change)(folder)
        with pytest.raises(UserError, match="sha256 must be|adapters must be trained or initial"):
            load_compressed(folder)
        (folder / MANIFEST).write_text(before)


def test_what_does_no_harm_is_read(folder: Path) -> None:
    """Files that are links, as the hub's cache has them, what a newer PEFT adds, and an index that nobody reads."""
    expected = logits_of(load_compressed(folder))
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to(folder.parent / "blob")
    edit(ADAPTER, from_the_future=3)(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../../elsewhere.safetensors"}}')
    (folder / "MANIFEST.JSON").write_text("{}")
    (folder / "tokenizer.json").write_bytes(b"\xff")
    relist(folder)
    assert torch.equal(logits_of(load_compressed(folder)), expected)


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(UserError, match="model.safetensors' is missing"):
        load_compressed(folder)
