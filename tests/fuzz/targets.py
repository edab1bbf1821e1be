"""What is read from disk: artefacts to damage, and a function for each that reads one and uses what it got."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from lightning.pytorch import Trainer
from mutations import BYTES, damage_file, damaged_tree, entries
from support.choice_records import RECORDS, many_records, write_records
from support.evaluations import write_evaluation
from support.families import HIDDEN, KEPT, KEPT_EXPERTS, VOCAB, adapted, logits_of, tiny_config, tiny_model

from qpruner.adapter_files import save_adapters
from qpruner.adapters.lora import LoRAConfig
from qpruner.allocation.decision import Allocation, Decision
from qpruner.allocation.items import Item
from qpruner.allocation.sensitivities import Rises, Sensitivities
from qpruner.anatomy import architecture_of
from qpruner.cli import QPrunerCLI
from qpruner.commands import run
from qpruner.datamodules import InstructionDataModule, TextDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.datamodules.choice_tasks import Part, read_task
from qpruner.datamodules.choices import ChoiceExamples
from qpruner.datamodules.questions import TASKS
from qpruner.datamodules.rows import Row, TextExamples, TokenRows
from qpruner.files import hash_file
from qpruner.model_folder import load_compressed, read_base_config, save_base
from qpruner.plan import DENSE, UNITS, CompressionPlan, Leading, Precision
from qpruner.pretrained import EMBEDDED, load_tokenizer
from qpruner.pruning.surgery import apply_pruning_
from qpruner.quantization.apply import quantize_
from qpruner.records.evaluation import TextScore
from qpruner.records.folder import RunFolder
from qpruner.records.manifest import record_session
from qpruner.records.report import Stage, Summary
from qpruner.records.search import Proposer, SearchResults, Tried
from qpruner.runs.claim import claim_folder
from qpruner.search.ledger import Ledger
from qpruner.training.module import LoRAFinetuner
from qpruner.training.recording import Form, Recording

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
LED = Precision("affine-double", 3, 32, Leading(9, INT8))
MIXED = [{"qkv": NF4, "o": INT8, "gate_up": DENSE, "down": NF4}] * 3
WORDS = ("Tom", "has", "a", "red", "ball", "and", "Lily", "found", "the", "blue", "kite", "in", "the", "park")


@dataclass(frozen=True)
class Target:
    """Something that qpruner reads.

    Args:
        make: writes the artefact whole into an empty folder.
        use: reads it, uses what it got, and makes sure that it is sane.
        damage: damages something in the folder and says what; any file, unless told.
        named: of what a refusal must name one, by what was damaged and the folder.
    """

    make: Callable[[Path], None]
    use: Callable[[Path], None]
    damage: Callable[[Random, Path], str] = lambda rng, folder: damage_file(rng, rng.choice(files_in(folder)))
    named: Callable[[str, Path], list[str]] = lambda damage, folder: [str(folder)]


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def quietly(arguments: Sequence[str]) -> str:
    """What a command prints; ends with status 1 count as its answer."""
    said = StringIO()
    with redirect_stdout(said):
        try:
            run(list(arguments))
        except SystemExit as ended:
            if ended.code != 1:
                raise
    return said.getvalue()


# Plans.


def pruned(family: str = "llama", kept: Any = KEPT) -> tuple[Any, CompressionPlan]:
    model = tiny_model(family)
    plan = CompressionPlan.dense(architecture_of(model.config), "ab12").keeping(kept)
    apply_pruning_(model, plan)
    return model, plan


def make_plans(folder: Path) -> None:
    plan = CompressionPlan.dense(architecture_of(tiny_config("llama")), None).keeping(KEPT)
    ordered = plan.reordered([*range(9, plan.architecture.hidden_size), *range(9)]).keeping(
        [(range(len(groups))[::-1], [*range(1, len(channels)), 0]) for groups, channels in KEPT]
    )
    ordered.with_precision([{**MIXED[0], "gate_up": LED}] * 3, embedding=INT8, head=LED).write(folder / "plan.json")
    plan.write(folder / "other.json")
    (folder / "base").mkdir()
    tiny_model("llama").save_pretrained(folder / "base")


def make_plans_of_experts(folder: Path) -> None:
    plan = CompressionPlan.dense(architecture_of(tiny_config("mixtral")), None)
    plan.keeping(KEPT_EXPERTS).with_precision(MIXED, head=INT8).write(folder / "plan.json")
    plan.write(folder / "other.json")
    (folder / "base").mkdir()
    tiny_model("mixtral").save_pretrained(folder / "base")


def damage_plan(rng: Random, folder: Path) -> str:
    return damage_file(rng, folder / "plan.json")


def use_plan(folder: Path) -> None:
    plan = CompressionPlan.read(folder / "plan.json")
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert quietly(["plan", "show", str(folder / "plan.json")]).startswith("A plan for a ")
    quietly(["plan", "diff", str(folder / "plan.json"), str(folder / "other.json")])
    assert "bytes of tensors" in quietly(["plan", "check", str(folder / "plan.json"), "--base", str(folder / "base")])


# Folders of models.


def make_packed(folder: Path) -> None:
    """Of mixed precision, with adapters and a tokenizer of its own."""
    model, plan = pruned()
    plan = plan.with_precision(MIXED, embedding=INT8, head=INT8)
    quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(folder / "model", model, plan, base_name="models/dense", tokenizer=None)
    save_adapters(folder / "model", adapted(model), trained=True)


def make_packed_experts(folder: Path) -> None:
    """Of the family whose experts have most parts."""
    model, plan = pruned("gpt_oss", KEPT_EXPERTS)
    plan = plan.with_precision(MIXED)
    quantize_(model, plan, None, device=torch.device("cpu"))
    save_base(folder / "model", model, plan, base_name="models/dense", tokenizer=None)


def make_dense(folder: Path) -> None:
    """Narrowed alone: as transformers expresses it, as it cannot, and in several files of weights."""
    for name, family, kept in (
        ("wide", "llama", [((0, 1, 3), range(40))] * 3),
        ("own", "qwen2", KEPT),
        ("sharded", "gemma2", KEPT),
    ):
        model, plan = pruned(family, kept)
        if name == "sharded":
            save = model.save_pretrained
            model.save_pretrained = lambda place: save(place, max_shard_size="60KB")  # noqa: B023  # called here
        save_base(folder / name, model, plan, base_name="models/dense", tokenizer=None)


def relist(folder: Path) -> None:
    """Makes a manifest fit what lies in its folder, so that only what is in the files is wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for name in manifest["files"]
        if (path := folder / name).is_file()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage_model(rng: Random, folder: Path) -> str:
    path = rng.choice(files_in(folder))
    for other in folder.iterdir():
        if not path.is_relative_to(other):
            shutil.rmtree(other)
    said = damage_file(rng, path)
    if path.name != "manifest.json" and rng.random() < 0.85:
        relist(next(place for place in path.parents if (place / "manifest.json").exists()))
        return f"{said}, with a manifest to fit"
    return said


def use_models(folder: Path) -> None:
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        architecture_of(read_base_config(str(place)))
        logits = logits_of(load_compressed(place))
        assert logits.ndim == 3 and logits.is_floating_point()


# Checkpoints of fits.


def make_checkpoint(folder: Path) -> None:
    (folder / "base").mkdir()
    tiny_model("llama").save_pretrained(folder / "base")
    module = LoRAFinetuner(base=str(folder / "base"), lora=LoRAConfig(r=2, dropout=0.0))
    module.load_base()
    module.compressed.prune(KEPT)
    module.keep_base(folder / "kept")
    module.configure_model()
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt", weights_only=False)


def quiet_trainer() -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, barebones=False,
        enable_model_summary=False,
    )  # fmt: skip


def damage_checkpoint(rng: Random, folder: Path) -> str:
    path = folder / "last.ckpt"
    if rng.random() < 0.3:
        how = rng.choice([*BYTES])
        path.write_bytes(BYTES[how](rng, path.read_bytes()))
        return how
    checkpoint = torch.load(path, weights_only=True)
    checkpoint, place = damaged_tree(rng, checkpoint)
    torch.save(checkpoint, path)
    return f"entry {place}"


def use_checkpoint(folder: Path) -> None:
    path = folder / "last.ckpt"
    module = LoRAFinetuner.load_from_checkpoint(path, base=str(folder / "base"), map_location="cpu", weights_only=True)
    assert logits_of(module.model.eval()).isfinite().all()


# Folders of runs.


def make_runs(folder: Path) -> None:
    run_folder = RunFolder(folder / "run")
    run_folder.path.mkdir()
    claim_folder(run_folder, OPTIONS, restart=False)
    stage = Stage("dense", 1000, 4000, None, {"perplexity": 3.14, "tokens": 12.0}, 1.25, None, 3 * 2**20)
    Summary(True, "rows of 8", "resident set", (stage, replace(stage, name="recovered", average_bits=4.5))).write(
        run_folder.summary
    )
    plan = CompressionPlan.dense(architecture_of(tiny_config("llama")), None).keeping(KEPT)
    plan.with_precision(MIXED).write(run_folder.plan)
    items = [Item(number, UNITS) for number in range(3)]
    Allocation(
        "sensitivity", "kl", "exact", "6 bits per weight", 5000, 4000, 9000, 5.678, False,
        tuple(Decision(item, (NF4, INT8), (1000, 2000), (0.5, 0.25), 1, 1, 0) for item in items),
    ).write(run_folder.allocation)  # fmt: skip
    Sensitivities(
        {"base": "x"},
        precisions=(NF4, INT8),
        rises=tuple(Rises(item, (0.5, 0.25), (0.4, 0.2), (0.3, 0.1)) for item in items),
    ).write(run_folder.sensitivities)
    RunFolder(run_folder.path, 1).checkpoint.parent.mkdir(parents=True)
    RunFolder(run_folder.path, 1).record_finished()
    begin_session(run_folder)
    search = RunFolder(folder / "search")
    search.path.mkdir()
    trials = tuple(Tried(f"trial {n}", (0, 1), 500 - n, 4.5, (2.0 + n, 2.1), {"loss": 2.0, "kl": 0.1}) for n in (1, 2))
    SearchResults(
        "rows of 8", "mutual_information", "6 bits", ("layer 0", "layer 1"), (4, 8), trials, {3: "MemoryError"},
        (trials[0], replace(trials[0], name="uniform", losses=(2.5,))), ("trial 1",),
        (Proposer("bayesian", 1, 4),),
    ).write(search.results)  # fmt: skip
    ledger = Ledger.open(search.ledger, SEARCH)
    for number in range(3):
        ledger.start(number, {"choices": [number, 1], "seed": 0}, number)
        if number < 2:
            ledger.finish(number, {"loss": 2.0 + number, "bytes": 500, "average_bits": 4.5})


OPTIONS = {"model": {"base": "x"}, "trainer": {"callbacks": [{"class_path": "A"}]}}
SEARCH = {"seed": 1, "widths": [4, 8], "search": {"trials": 4}}


def begin_session(folder: RunFolder) -> None:
    data = {"train": {"rows": 2, "tokens": 9, "sha256": "x"}}
    compression = [{"callback": "StructuredPruning", "ratio": 0.2}]
    record_session(
        folder.manifest, seed=3, base={"name": "a", "sha256": "1"}, data=data, compression=compression,
        devices="1 x cpu", phase=1,
    )  # fmt: skip


def damage_run(rng: Random, folder: Path) -> str:
    path = rng.choice(files_in(folder))
    shutil.rmtree(folder / ("search" if path.is_relative_to(folder / "run") else "run"))
    return damage_file(rng, path)


def use_runs(folder: Path) -> None:
    run_folder, search = RunFolder(folder / "run"), RunFolder(folder / "search")
    with patch("qpruner.records.report.save_figure", draw), patch("qpruner.records.search.save_figure", draw):
        if run_folder.path.exists():
            assert run_folder.finished_phases >= 0
            assert isinstance(run_folder.finished, bool)
            claim_folder(run_folder, OPTIONS, restart=False)
            begin_session(run_folder)
            quietly(["report", str(run_folder.path)])
            assert run_folder.report.stat().st_size
        if search.path.exists():
            assert all(isinstance(record.key, dict) for record in Ledger.open(search.ledger, SEARCH).records)
            quietly(["report", str(search.path)])
            assert search.report.stat().st_size


# Evaluations.


def make_evaluations(folder: Path) -> None:
    write_evaluation(folder / "a", {"boolq": [True, False, True], "piqa": [True, True, False]}, texts=[WIKITEXT])
    write_evaluation(folder / "b" / "evaluation", {"boolq": [True, True, False], "piqa": [True] * 3}, texts=[WIKITEXT])


def use_evaluations(folder: Path) -> None:
    with patch("qpruner.records.comparison.save_figure", draw):
        said = quietly(["compare", str(folder / "a"), str(folder / "b"), "--output", str(folder / "out")])
    assert "| a " in said and "| b " in said


WIKITEXT = TextScore("wikitext2", "128 tokens", 1000, 12.5, 1.1, "wiki.txt", 2.0)


def draw(figure: Any, path: Path) -> None:
    """In place of writing the picture, which takes most of the time."""
    figure.draw_without_rendering()


# Data.


def make_data(folder: Path) -> None:
    rng = Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(9, 40))) for _ in range(40)]
    records = [{"text": text, "instruction": text[:20], "output": text[20:], "input": ""} for text in texts]
    tokenizer = load_tokenizer(EMBEDDED)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "tokenizer")
    for record in records[:10]:
        turns = [("user", record["text"]), ("assistant", "Yes.")]
        record["messages"] = [{"role": role, "content": text} for role, text in turns]
    (folder / "data.txt").write_text("\n\n".join(texts))
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data.json").write_text(json.dumps(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[10:]), folder / "data.parquet")
    (folder / "data.csv").write_text("text,output\n" + "".join(f'"{text}","x"\n' for text in texts))


def make_tasks(folder: Path) -> None:
    for name in TASKS:
        write_records(folder / "tasks" / name / "validation.jsonl", RECORDS[name] + many_records(name, 5))
    rows = pyarrow.Table.from_pylist(many_records("openbookqa", 8))
    pyarrow.parquet.write_table(rows, folder / "tasks" / "openbookqa" / "test.parquet")
    write_records(folder / "tasks" / "arc_easy" / "test.jsonl.gz", many_records("arc_easy", 8))


def use_tasks(folder: Path) -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    for name in TASKS:
        for part in PARTS:
            given = read_task(folder / "tasks", name, part)
            examples = ChoiceExamples.of(name, "acc", given, tokenizer, max_length=64, pad_token=0)
            batch = examples.collate(range(len(examples)))
            assert (batch["gold"] < (batch["lengths"] > 0).sum(1)).all() and (batch["gold"] >= 0).all()
            assert 0 <= int(batch["input_ids"].min()) <= int(batch["input_ids"].max()) < 2048


PARTS: tuple[Part, ...] = ("validation", "test", "all")


def damage_data(rng: Random, folder: Path) -> str:
    path = rng.choice([folder / f"data.{suffix}" for suffix in ("txt", "jsonl", "json", "parquet", "csv")])
    said = damage_file(rng, path)
    (folder / "source").write_text(str(path))
    return said


def use_data(folder: Path) -> None:
    source = folder / "source"
    path = Path(source.read_text()) if source.exists() else folder / "data.jsonl"
    for module in (TextDataModule, InstructionDataModule):
        data = module(
            train=str(path), tokenizer=str(folder / "tokenizer"), max_length=128, loader=LoaderConfig(batch_size=1),
            cache_dir=str(folder / "cache"), held_out=0.0,
        )  # fmt: skip
        if module is InstructionDataModule and path.suffix == ".txt":
            continue
        rows = data.examples("train").rows
        assert len(rows) > 0 and 0 <= int(rows.tokens.min()) <= int(rows.tokens.max()) < 2048
        assert next(iter(data.train_dataloader()))["input_ids"].shape[1] <= 128


# Options.


class ParsingCLI(QPrunerCLI):
    """Makes the data module, the callbacks and the model of a command, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


CONFIG = {
    "seed_everything": 3,
    "run": {"name": "fuzz"},
    "model": {
        "base": "qpruner/stories",
        "dtype": "float32",
        "lora": {"r": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        "optimizer": {"name": "adamw", "lr": 3.0e-4, "warmup_steps": 10},
    },
    "data": {
        "class_path": "StoriesDataModule",
        "init_args": {
            "num_train": 24,
            "num_validation": 2,
            "num_test": 2,
            "num_choices": 0,
            "max_length": 32,
            "loader": {"batch_size": 16},
        },
    },
    "trainer": {
        "max_epochs": 1,
        "val_check_interval": 0.5,
        "accelerator": "cpu",
        "callbacks": [
            {"class_path": "StructuredPruning", "init_args": {"ratio": 0.2, "calibration": {"num_sequences": 8}}},
            {"class_path": "MixedPrecisionQuantization", "init_args": {"bits": [8, 4, 4, 4, 4, 8]}},
        ],
    },
    "phases": [{"max_epochs": 1, "callbacks": [{"class_path": "StructuredPruning", "init_args": {"ratio": 0.1}}]}],
}
_cli: list[ParsingCLI] = []


def option_names(tree: Any) -> list[str]:
    return [key for path in entries(tree) if isinstance(key := path[-1], str)]


def make_options(folder: Path) -> None:
    CONFIG["run"] = {"name": "fuzz", "dir": str(folder.parent / "runs")}
    (folder / "options.yaml").write_text(yaml.safe_dump(CONFIG))
    if not _cli:  # building the parser takes a second
        _cli.append(ParsingCLI(["fit", "--config", str(folder / "options.yaml")]))


def damage_options(rng: Random, folder: Path) -> str:
    path = folder / "options.yaml"
    if rng.random() < 0.2:
        return damage_file(rng, path)
    tree, place = damaged_tree(rng, yaml.safe_load(path.read_text()))
    path.write_text(yaml.safe_dump(tree, allow_unicode=False))
    return f"options.yaml {' '.join(map(str, place))}"


def use_options(folder: Path) -> None:
    (cli,) = _cli
    cli.parse_arguments(cli.parser, ["fit", "--config", str(folder / "options.yaml")])
    cli.before_instantiate_classes()
    cli.instantiate_classes()
    assert isinstance(cli.model, LoRAFinetuner)


# What a teacher said.

TAUGHT = Form(top_k=5, temperature=2.0, hidden_size=HIDDEN, dtype="float32", vocab_size=VOCAB)


def recording_in(folder: Path) -> Recording:
    rng = np.random.default_rng(3)
    rows = [Row(rng.integers(5, VOCAB, 9).astype(np.int32), np.ones(9, bool), np.zeros(9, np.int32)) for _ in range(4)]
    return Recording(folder, TextExamples(TokenRows.of(rows), pad_token=0), range(4), TAUGHT, ["ab12"])


def make_recording(folder: Path) -> None:
    recording_in(folder).record(tiny_model("llama"), [0], device=torch.device("cpu"), forward_context=nullcontext)


def use_recording(folder: Path) -> None:
    recording = recording_in(folder)
    batch = recording.examples.collate([2, 0])
    lesson = recording.lesson(batch)
    kl = lesson.kl(torch.zeros(16, VOCAB), slice(0, 16))
    assert lesson.hidden is not None and lesson.hidden.shape == (16, HIDDEN) and not kl.isnan().any()


TARGETS = {
    "plan": Target(make_plans, use_plan, damage_plan),
    "plan of experts": Target(make_plans_of_experts, use_plan, damage_plan),
    "packed model": Target(make_packed, use_models, damage_model),
    "packed experts": Target(make_packed_experts, use_models, damage_model),
    "dense models": Target(make_dense, use_models, damage_model),
    "checkpoint": Target(make_checkpoint, use_checkpoint, damage_checkpoint),
    "runs": Target(make_runs, use_runs, damage_run),
    "evaluations": Target(make_evaluations, use_evaluations),
    "recording": Target(make_recording, use_recording),
    "data": Target(make_data, use_data, damage_data, lambda damage, folder: [damage.split()[0], "--data."]),
    "tasks": Target(make_tasks, use_tasks),
    "options": Target(
        make_options, use_options, damage_options, lambda damage, folder: [*option_names(CONFIG), "config"]
    ),
}
