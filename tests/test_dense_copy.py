"""What `qpruner merge` needs, and what it says where something is missing."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import logits_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpruner.commands import run
from qpruner.dense_copy import model_folder
from qpruner.errors import UserError
from qpruner.files import hash_file, read_json, write_json
from qpruner.folder_manifest import is_compressed
from qpruner.model_folder import load_compressed
from qpruner.pretrained import EMBEDDED, load_tokenizer

OPTIONS = {
    "model.base": "base",
    "model.lora.r": 2,
    "model.optimizer.lr": 0.05,
    "data": "TextDataModule",
    "data.train": "text/train.txt",
    "data.validation": "text/validation.txt",
    "data.test": "text/test.txt",
    "data.separator": "STOP",
    "data.max_length": 24,
    "run.dir": "runs",
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 2,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
}
QUANTIZED = ["--trainer.callbacks+=MixedPrecisionQuantization", "--trainer.callbacks.bits=[4, 8]"]


def fit(name: str, *more: str) -> None:
    run(["fit", f"--run.name={name}", *(f"--{key}={value}" for key, value in OPTIONS.items()), *more])


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a base, text, and a run that knows both by relative paths."""
    place = tmp_path_factory.mktemp("work")
    shutil.copytree(tiny_llama, place / "base")
    (place / "text").mkdir()
    for split in ("train", "validation", "test"):
        stories = [f"{split} {number}: a fox and a hen went to the {number} hills." for number in range(12)]
        (place / "text" / f"{split}.txt").write_text("STOP".join(stories))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        fit("x", *QUANTIZED)
    return place


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to be in and to break."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def merged(run_folder: Any, output: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said; the copy is that of the run's model."""
    capsys.readouterr()
    run(["merge", str(run_folder), str(output)])
    tokens = torch.arange(20).view(2, 10) + 5
    expected = logits_of(load_compressed(model_folder(Path(run_folder))), tokens)
    found = logits_of(AutoModelForCausalLM.from_pretrained(output).float(), tokens)
    assert 0 < (found - expected).norm() / expected.norm() < 0.01  # what rounding to bfloat16 costs
    assert AutoTokenizer.from_pretrained(output)("a fox")["input_ids"]
    return capsys.readouterr().out


def test_where_the_data_are_there_the_perplexity_is_measured(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recovered = read_json(work / "runs/x/summary.json")["stages"][-1]["results"]["perplexity"]
    said = merged("runs/x", "out/of/nothing", capsys)  # the parents are made
    assert f"{recovered:.4f} with adapters beside their base" in said
    card = (work / "out/of/nothing/README.md").read_text()
    assert "\n# nothing\n" in card and f"{recovered:.3f}" in card and "`merge(dtype='bfloat16')`" in card
    assert "base_model" not in card  # a run is no name of the hub


def test_a_gpu_without_room_is_not_needed(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merged("runs/x", "one", capsys).splitlines()[-1]

    def refuse(model: Any, device: torch.device) -> None:
        assert device.type == "cuda"
        raise UserError("There is no room.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("qpruner.dense_copy.place_", refuse)
    assert merged("runs/x", "other", capsys).splitlines()[-1] == expected and "Perplexity" in expected


@pytest.mark.parametrize("given", ["moved", "model"])
def test_the_runs_model_is_enough(work: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    shutil.rmtree(work / "base")
    if given == "moved":
        shutil.rmtree(work / "text")
        shutil.move(work / "runs/x", work / "elsewhere")
        said = merged(work / "elsewhere", work / "out", capsys)
        assert "not measured: the data of the run cannot be had from here" in said and "text/train.txt" in said
        assert "Namespace" not in said and "Traceback" not in said
    else:
        shutil.move(work / "runs/x/model", work / "model")
        shutil.rmtree(work / "runs")
        assert "lies in no run" in merged(work / "model", work / "out", capsys)


def test_it_can_be_called_from_anywhere(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cannot be had from here" in merged(work / "runs/x/model", "out", capsys)


def test_other_data_of_that_name_are_not_measured_on(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "text/test.txt").write_text("STOP".join(f"story {n} of the hens and the hills" for n in range(12)))
    assert "are not those of the run" in merged("runs/x", "out", capsys)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"data": 3}'])
def test_without_the_record_of_the_data_nothing_is_measured_on_them(
    work: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (work / "runs/x/manifest.json").write_text(content)
    said = merged("runs/x", "out", capsys)
    assert "not measured: the data of the run cannot be had from here (" in said and "runs/x/manifest.json" in said


def test_the_tokenizer_goes_along_whoever_wrote_its_code(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_json(work / "base/tokenizer_config.json") | {"auto_map": {"AutoTokenizer": [None, "tok_my.MyTok"]}}
    write_json(work / "base/tokenizer_config.json", config)
    (work / "base/tok_my.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass MyTok(PreTrainedTokenizerFast):\n    mine = True\n"
    )
    (work / "base/additional_chat_templates").mkdir()
    (work / "base/additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    fit("own", *QUANTIZED, "--model.trust_remote_code=true")
    run(["merge", "runs/own", "out"])
    assert "with adapters beside their base" in capsys.readouterr().out
    for folder in (work / "runs/own/model", work / "out"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert tokenizer.mine and tokenizer.chat_template["tool_use"] == "{{ tools }}"
        assert tokenizer("a fox")["input_ids"] == load_tokenizer(EMBEDDED)("a fox")["input_ids"]
        assert load_compressed(folder)  # all of it is in the manifest
    files = {path.relative_to(work / "out").as_posix() for path in (work / "out").rglob("*") if path.is_file()}
    model = {"config.json", "generation_config.json", "model.safetensors", "plan.json", "manifest.json"}
    model |= {"reference/logits.safetensors", "README.md"}
    of_tokenizer = {"tok_my.py", "tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool_use.jinja"}
    assert files == model | of_tokenizer


@pytest.mark.parametrize("given", ["runs/x", "runs/x/model/adapter"])
def test_the_folder_beside_that_of_the_model_is_told(work: Path, given: str) -> None:
    assert not is_compressed(Path(given))
    with pytest.raises(UserError, match=f"'{given}' holds no compressed model; 'runs/x/model' does. Name that"):
        load_compressed(given)
    with pytest.raises(UserError, match="qpruner merge .*/runs/x/model FOLDER|'runs/x/model' does. Give the folder of"):
        fit("on_adapters", f"--model.base={given}")


def broken(work: Path, file: str, change: Any) -> None:
    """Alters a file of the model and its entry in the manifest."""
    model = work / "runs/x/model"
    tensors = load_file(model / file)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    tensors[name] = change(tensors[name])
    save_file(tensors, model / file)
    manifest = read_json(model / "manifest.json")
    manifest["files"][file] = {"size": (model / file).stat().st_size, "sha256": hash_file(model / file)}
    write_json(model / "manifest.json", manifest)


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "model.safetensors"])
def test_what_is_not_finite_is_refused_by_name(work: Path, file: str) -> None:
    broken(work, file, lambda tensor: tensor * torch.nan)
    with pytest.raises(UserError, match=r"Of the model in 'runs/x/model', .*(lora_|embed).* not finite.*lower"):
        run(["merge", "runs/x", "deep/out"])
    assert not (work / "deep").exists()


def test_what_float16_cannot_hold_is_refused(work: Path) -> None:
    broken(work, "model.safetensors", lambda tensor: tensor.clone().fill_(1e6))
    with pytest.raises(UserError, match=r"merged model in float16, .*not finite. Merge with --dtype bfloat16"):
        run(["merge", "runs/x", "out", "--dtype", "float16"])


def test_places_that_cannot_be_written_are_found_first(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpruner.dense_copy.load_compressed", lambda folder: pytest.fail("too late"))
    (work / "dangling").symlink_to("nowhere")
    for output, said in (
        ("text", "is there already"),
        ("dangling", "is there already"),
        ("text/test.txt/out", "text/test.txt' is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            run(["merge", "runs/x", output])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="may not be written"):
        run(["merge", "runs/x", "deep/out"])
    assert not Path("deep").exists()


def test_a_run_that_compressed_nothing_is_merged(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("plain")
    said = merged("runs/plain", "out", capsys)
    assert "Perplexity on the test split" in said
    dense = load_file(work / "base/model.safetensors")
    changed = {
        name
        for name, tensor in load_file("out/model.safetensors").items()
        if not torch.equal(tensor.float(), dense[name].bfloat16().float())
    }
    assert changed and all(name.endswith("proj.weight") for name in changed)  # what adapters were on


def test_what_is_no_finished_run_is_named(work: Path) -> None:
    (work / "search").mkdir()
    for name in ("config.yaml", "search.json"):
        (work / "search" / name).write_text("{}")
    for given, said in (
        ("runs/z", "There is no folder 'runs/z'"),
        ("text", "'text' is the folder of no run"),
        ("search", "is a search.*qpruner fit --plan search/plan.json"),
    ):
        with pytest.raises(UserError, match=said):
            run(["merge", given, "out"])
    (work / "runs/x/model").rename(work / "kept")
    with pytest.raises(UserError, match="The run 'runs/x' keeps no model: 'runs/x/model' holds none. Put it back"):
        run(["merge", "runs/x", "out"])
    (work / "kept").rename(work / "runs/x/model")
    summary = read_json(work / "runs/x/summary.json")
    write_json(work / "runs/x/summary.json", summary | {"finished": False})
    with pytest.raises(UserError, match="The run 'runs/x' is not over"):
        run(["merge", "runs/x", "out"])
    manifest = read_json(work / "runs/x/model/manifest.json")
    write_json(work / "runs/x/model/manifest.json", manifest | {"adapters": "initial"})
    with pytest.raises(UserError, match="The fit of 'runs/x/model' is not over"):
        run(["merge", "runs/x/model", "out"])


@pytest.mark.slow
def test_runs_of_phases_and_of_pruning_in_training_are_merged(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guided = ["--trainer.callbacks+=LoRAGuidedPruning", "--trainer.callbacks.ratio=0.1", "--trainer.max_steps=6"]
    guided += ["--trainer.callbacks.schedule.every_n_steps=1"]
    phases = "[{max_steps: 2, callbacks: [{class_path: MixedPrecisionQuantization, init_args: {bits: [4, 8]}}]}]"
    fit("guided", *guided, f"--phases={phases}")
    recovered = read_json(work / "runs/guided/summary.json")["stages"][-1]["results"]["perplexity"]
    assert model_folder(Path("runs/guided")) == Path("runs/guided/model")
    capsys.readouterr()
    for number, given in enumerate(("runs/guided", "runs/guided/phases/1/model")):
        run(["merge", given, f"out{number}"])
        said = capsys.readouterr().out
        assert "with adapters beside their base" in said
        assert (f"{recovered:.4f} with" in said) == (number == 0)
