"""`qpruner evaluate` as a person types it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from support.choice_records import many_records, write_records
from support.forks import in_fork
from support.runs import KILL_AT, in_own_process

from qpruner.commands import run
from qpruner.compressed import CompressedModel
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.pretrained import load_tokenizer
from qpruner.records.evaluation import Evaluation, items_file
from qpruner.records.folder import RunFolder

Evaluate = Callable[..., Evaluation]
TASKS = ("piqa", "openbookqa", "boolq")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in TASKS:
        write_records(tmp_path / "zeroshot" / name / "test.jsonl", many_records(name, 10))
    return tmp_path / "zeroshot"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text(" ".join(record["sol1"] for record in many_records("piqa", 30)))
    return f"words={tmp_path / 'text.txt'}"


def words(model: Path | str, *options: Any, quiet: bool = True) -> list[str]:
    return [
        "evaluate",
        str(model),
        "--accelerator",
        "cpu",
        *(["--new-tokens", "0"] if quiet else []),
        *map(str, options),
    ]


def evaluate(place: Path, model: Path | str, *options: Any) -> Evaluation:
    run(words(model, *options, "--output", place))
    return Evaluation.read(place / "evaluation.json")


def without_seconds(evaluation: Evaluation) -> Evaluation:
    tasks = {name: replace(score, seconds=0.0) for name, score in evaluation.tasks.items()}
    texts = tuple(replace(score, seconds=0.0) for score in evaluation.texts)
    return replace(evaluation, tasks=tasks, texts=texts, peak_inference=None)


def test_the_embedded_model_by_default(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(
        ["evaluate", "qpruner/stories", "--tasks", "endings", "--items", "20", "--new-tokens", "3", "--prompts", "Once"]
    )
    place = Path("runs", "evaluations", "qpruner--stories")
    evaluation = Evaluation.read(place / "evaluation.json")
    assert (evaluation.tasks["endings"].items, evaluation.tasks["endings"].split) == (20, "test")
    assert evaluation.tasks["endings"].source.startswith("qpruner/stories sha256:")
    assert [sample.prompt for sample in evaluation.samples] == ["Once"]
    said = capsys.readouterr().out
    assert "| endings |" in said and f"Report: {place / 'report.md'}" in said
    assert "Once ‖" in (place / "report.md").read_text()


@pytest.mark.slow
def test_a_run_is_what_its_own_test_says(
    config: dict[str, Any], folder: Path, tmp_path: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["piqa", "openbookqa"]
    config["data"]["init_args"]["tasks"] = {"folder": str(folder), "names": names}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    killed = in_fork(KILL_AT, "training", "4", "fit", "--config", str(path))
    assert killed.returncode == -9
    model = tmp_path / "runs" / "x"
    with pytest.raises(UserError, match="The run .*x' is not over. Finish it first: repeat its command"):
        run(words(model, "--tasks", "piqa", "--folder", folder))
    run(["fit", "--config", str(path)])
    run(["test", "--config", str(path)])
    results = read_json(model / "test.json")["stages"][-1]["results"]
    run(words(model, "--tasks", "piqa,openbookqa", "--folder", folder))
    evaluation = Evaluation.read(model / "evaluation" / "evaluation.json")
    for name in names:
        score = evaluation.tasks[name]
        assert (score.items, score.acc, score.acc_norm) == tuple(
            results[f"{name}/{way}"] for way in ("examples", "acc", "acc_norm")
        )
    # The folder of its model holds the same weights; a run that begins anew leaves nothing of them.
    assert evaluate(model / "evaluation", model / "model", "--tasks", *names, "--folder", folder) == evaluation
    assert "were answered before" in capsys.readouterr().out
    RunFolder(model).clear()
    assert not (model / "evaluation").exists()


def test_a_dense_folder_and_a_compressed_one(tiny_llama: Path, folder: Path, tmp_path: Path, here: Path) -> None:
    compressed = CompressedModel.load(str(tiny_llama), dtype="float32")
    compressed.keep(tmp_path / "kept", tokenizer=load_tokenizer(str(tiny_llama)), trained=False)
    options = ("--tasks", *TASKS, "--folder", folder, "--split", "all")
    dense, kept = (
        evaluate(tmp_path / model.name / "out", model, *options) for model in (tiny_llama, tmp_path / "kept")
    )
    assert dense.identity != kept.identity and dense.parameters == kept.parameters
    for name in TASKS:
        assert replace(dense.tasks[name], seconds=0.0) == replace(kept.tasks[name], seconds=0.0)
        assert dense.tasks[name].items == 10
    # The same weights in another number format are others.
    with pytest.raises(UserError, match="other weights"):
        evaluate(tmp_path / tiny_llama.name / "out", tiny_llama, *options, "--dtype", "bfloat16")
    run(words(tmp_path / "kept", "--new-tokens", "1"))
    (place,) = (here / "runs" / "evaluations").iterdir()
    assert place.name == "--".join((tmp_path / "kept").resolve().parts[1:])


def test_a_killed_evaluation_goes_on_where_it_was(
    tiny_llama: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("--tasks", *TASKS, "--folder", folder, "--split", "all", "--batch-tokens", 1)  # a question a batch
    place = tmp_path / "out"
    killed = in_fork(KILL_AT, "answering", "15", *words(tiny_llama, *options, "--output", place))
    assert killed.returncode == -9, killed.stderr
    assert [*Evaluation.read(place / "evaluation.json").tasks] == ["piqa"]
    first = items_file(place, "piqa").stat().st_mtime_ns
    killed = in_fork(KILL_AT, "answering", "15", *words(tiny_llama, *options, "--output", place))
    assert killed.returncode == -9 and "piqa: 10 questions were answered before" in killed.stdout
    again = evaluate(place, tiny_llama, *options)
    assert items_file(place, "piqa").stat().st_mtime_ns == first
    assert without_seconds(again) == without_seconds(evaluate(tmp_path / "whole", tiny_llama, *options))
    for name in TASKS:
        assert items_file(place, name).read_bytes() == items_file(tmp_path / "whole", name).read_bytes()
    assert sorted(path.name for path in place.iterdir()) == [".lock", "evaluation.json", "items", "report.md"]


def test_texts_by_lengths_and_strides(tiny_llama: Path, text: str, tmp_path: Path) -> None:
    place = tmp_path / "out"
    evaluate(place, tiny_llama, "--texts", text, "--lengths", 16, 32)
    evaluation = evaluate(place, tiny_llama, "--texts", text, "--lengths", 16, 32, "--stride", 8)
    protocols = ["16 tokens, disjoint", "32 tokens, disjoint", "16 tokens, stride 8", "32 tokens, stride 8"]
    assert [score.protocol for score in evaluation.texts] == protocols
    tokens = {score.tokens for score in evaluation.texts if "stride" in score.protocol}
    assert len(tokens) == 1 and all(score.tokens % 15 == 0 for score in evaluation.texts[:1])
    again = evaluate(place, tiny_llama, "--texts", text, "--lengths", 32, 64)
    assert again.texts[:4] == evaluation.texts and again.texts[4].protocol == "64 tokens, disjoint"
    default = evaluate(tmp_path / "default", tiny_llama, "--texts", text)
    assert [score.protocol for score in default.texts] == ["256 tokens, disjoint"]  # what the model knows


@pytest.mark.slow  # `test_processes_deal_the_questions_and_have_what_one_has` deals the same among threads
def test_two_gloo_ranks_measure_as_one(tiny_llama: Path, folder: Path, text: str, tmp_path: Path) -> None:
    options = ("--tasks", *TASKS, "--folder", folder, "--texts", text, "--lengths", 32, "--batch-tokens", 300)
    done = in_own_process("-m", "qpruner", *words(tiny_llama, *options, "--devices", 2, "--output", tmp_path / "2"))
    assert done.returncode == 0, done.stderr
    one, two = evaluate(tmp_path / "1", tiny_llama, *options), Evaluation.read(tmp_path / "2" / "evaluation.json")
    assert without_seconds(replace(one, texts=())) == without_seconds(replace(two, texts=()))
    for name in TASKS:
        assert items_file(tmp_path / "1", name).read_bytes() == items_file(tmp_path / "2", name).read_bytes()
    assert one.texts[0].tokens == two.texts[0].tokens
    assert one.texts[0].perplexity == pytest.approx(two.texts[0].perplexity, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "bolq"], "There is no task 'bolq'.*Did you mean 'boolq'"),
        (["--tasks", "boolq"], "questions of 'boolq' are read from files: give --folder, .* or --harness"),
        (["--tasks", "piqa,boolq", "piqa"], "--tasks names 'piqa' twice"),
        (["--tasks", "boolq", "--folder", "nowhere"], "'boolq' has no file in 'nowhere/boolq'"),
        (["--tasks", "endings", "--items", "0"], "--items is 0; it must be at least 1"),
        (["--texts", "wiki.txt"], "--texts has 'wiki.txt'; give each text a name: wikitext2=wiki.txt"),
        (["--texts", "a=b.txt", "a=c.txt"], "--texts names 'a' twice"),
        (["--texts", "a=nowhere.txt"], "nowhere.txt"),
        (
            ["--tasks", "endings", "--lengths", "16"],
            "--lengths and --stride say how to cut --texts, and there are none",
        ),
        (["--texts", "a=b.txt", "--lengths", "16", "--stride", "17"], "The stride 17 is not in 1..16"),
        ([], "There is nothing to measure: give --tasks, --texts, or --new-tokens above 0"),
        (["--tasks", "endings", "--few-shot", "2"], "--few-shot is for tasks of the harness"),
        (["--tasks", "piqa", "--harness", "--devices", "2"], "harness works on one device here. Give --devices 1"),
        (["--tasks", "piqa", "--harness", "--split", "all"], "--split is all, and the harness takes the split"),
        (["--tasks", "endings", "--split", "all"], "--split is all, and the stories of endings are of validation or"),
        (["--tasks", "endings", "--accelerator", "abacus"], "Cannot use --accelerator abacus .*invalid accelerator"),
        (["--tasks", "endings", "--devices", "0"], "--devices is 0; it must be at least 1"),
        (["--tasks", "endings", "--batch-tokens", "0"], "--batch-tokens is 0"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    options: list[str], said: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.evaluate_command.Subject", None)
    with pytest.raises(UserError, match=said):
        run(words("qpruner/stories", *options))
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output", "file"], "Cannot write into 'file': 'file' is no folder. Name another folder to write"),
        (["--output", "file/out"], "Cannot write into 'file/out': '.*file' is no folder. Name another folder to write"),
        (["--output", "used"], "Another process writes its results into 'used'. Wait for it"),
        (["--output", "new", "--stride", "600"], r"The stride 600 is not in 1\.\.256"),
        (["--output", "empty", "--stride", "600"], r"The stride 600 is not in 1\.\.256"),
    ],
)
def test_places_and_strides_are_refused_before_the_model_is_loaded(
    options: list[str], said: str, text: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpruner.evaluate_command.Subject", None)
    Path("file").write_text("mine")
    Path("used").mkdir()
    Path("empty").mkdir()
    with FileLock("used/.lock"), pytest.raises(UserError, match=said):
        run(words("qpruner/stories", "--texts", text, *options))
    assert {path.name for path in here.iterdir()} == {"file", "used", "empty"} and not any(Path("empty").iterdir())


def test_the_missing_harness_is_told_before_the_model_is_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"need the extra `eval`.*pip install 'qpruner\[eval\]'"):
        run(words("./nowhere", "--tasks", "mmlu", "--harness"))


def test_a_missing_folder(here: Path) -> None:
    with pytest.raises(UserError, match="no folder './nowhere'"):
        run(words("./nowhere", "--tasks", "endings"))
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "257"], "longer than the 256 positions that the model knows. Give a length of at most 256"),
        (["--lengths", "100000"], "do not fill a window of 100,000"),
        (["--stride", "300"], "The stride 300 is not in 1..256"),
        (["--new-tokens", "300"], "more than the 256 positions that the model knows"),
    ],
)
def test_what_the_model_cannot_do_is_told_before_anything_is_measured(
    options: list[str], said: str, tiny_llama: Path, text: str, folder: Path, tmp_path: Path
) -> None:
    asked = ["--tasks", "piqa", "--folder", folder, "--texts", text, *options, "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=said):
        run(words(tiny_llama, *asked))
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_damaged_results_are_named_with_the_remedy(tiny_llama: Path, folder: Path, tmp_path: Path) -> None:
    options = ("--tasks", "piqa", "--folder", folder)
    evaluate(tmp_path / "out", tiny_llama, *options)
    file = tmp_path / "out" / "evaluation.json"
    file.write_text(json.dumps(read_json(file) | {"tasks": 3}))
    with pytest.raises(UserError, match=r"evaluation.json.*Delete the file and repeat the command"):
        evaluate(tmp_path / "out", tiny_llama, *options)
    assert [*evaluate(tmp_path / "out", tiny_llama, *options, "--restart").tasks] == ["piqa"]
