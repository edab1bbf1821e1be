"""What a report says of an evaluation, cell by cell."""

from dataclasses import replace
from math import inf
from pathlib import Path

from qpruner.records.evaluation import Evaluation, HarnessTask, Sample, TaskScore, TextScore
from qpruner.records.evaluation_report import (
    evaluation_table,
    samples_section,
    write_evaluation_report,
)

SAMPLE = Sample("Once upon", " a time.", (0.75, 1.0, 0.5, 0.25), 0.125)
EVALUATION = Evaluation(
    model="runs/x/model",
    identity="ab12",
    parameters=1234567,
    tensor_bytes=2_000_000,
    average_bits=None,
    peak_of="resident set of the process",
    peak_inference=3 * 2**20,
    tasks={
        "boolq": TaskScore(101, 0.5, 0.4, "acc", "boolq.jsonl, SHA-256 cd", "test", 1.25),
        "hellaswag": TaskScore(1001, 0.3, 0.36, "acc_norm", "hellaswag.jsonl, SHA-256 ef", "validation", 10.0),
    },
    texts=(
        TextScore(
            "wikitext2", "2,048 tokens, disjoint", 1_000, 1234.56789, 2.5, "wiki.txt, SHA-256 01", 3.0, dropped=7
        ),
        TextScore("wikitext2", "2,048 tokens, stride 512", 1_007, inf, None, "wiki.txt, SHA-256 01", 9.0),
    ),
    samples=(SAMPLE,),
)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_tasks_have_their_errors_and_a_mean_of_what_they_are_reported_by() -> None:
    tasks, _ = evaluation_table(EVALUATION).split("\n\n")
    assert cells(tasks)[2:] == [
        # sqrt(0.5 * 0.5 / 100) = 0.05 and sqrt(0.4 * 0.6 / 100) = 0.049
        ["boolq", "test", "101", "50.0 ± 5.0", "40.0 ± 4.9", "acc", "50.0 ± 5.0", "1.2"],
        # sqrt(0.3 * 0.7 / 1000) = 0.0145 and sqrt(0.36 * 0.64 / 1000) = 0.0152
        ["hellaswag", "validation", "1,001", "30.0 ± 1.4", "36.0 ± 1.5", "acc_norm", "36.0 ± 1.5", "10.0"],
        # (0.5 + 0.36) / 2, and sqrt(0.05 ** 2 + 0.0152 ** 2) / 2 = 0.0261
        ["mean of 2", "", "1,102", "", "", "", "43.0 ± 2.6", "11.2"],
    ]


def test_a_task_alone_has_no_mean_and_an_item_alone_no_error() -> None:
    alone = replace(EVALUATION, tasks={"boolq": replace(EVALUATION.tasks["boolq"], items=1, acc=1.0)}, texts=())
    assert cells(evaluation_table(alone))[2:] == [["boolq", "test", "1", "100.0", "40.0", "acc", "100.0", "1.2"]]


def test_texts_have_their_protocols() -> None:
    _, texts = evaluation_table(EVALUATION).split("\n\n")
    assert cells(texts) == [
        ["text", "protocol", "tokens scored", "dropped", "perplexity", "bits per byte", "seconds"],
        cells(texts)[1],
        ["wikitext2", "2,048 tokens, disjoint", "1,000", "7", "1,234.568", "2.5000", "3.0"],
        ["wikitext2", "2,048 tokens, stride 512", "1,007", "0", "inf", "-", "9.0"],
    ]


def test_samples_show_their_numbers_and_the_text_to_the_letter() -> None:
    assert samples_section([SAMPLE]).splitlines()[4:] == [
        "| text | distinct-1 | distinct-2 | distinct-3 | distinct-4 | repetition |",
        "|------|-----------:|-----------:|-----------:|-----------:|-----------:|",
        "| 1    |       0.75 |       1.00 |       0.50 |       0.25 |      12.5% |",
        "",
        "Text 1, behind its prompt and ‖:",
        "",
        "```text",
        "Once upon ‖ a time.",
        "```",
    ]


def test_no_text_leaves_its_fence_and_a_long_one_is_cut() -> None:
    code = samples_section([replace(SAMPLE, text="\n````\n# Not a heading\n```")])
    assert code.endswith("`````text\nOnce upon ‖\n````\n# Not a heading\n```\n`````")
    assert samples_section([replace(SAMPLE, text="ab" * 301)]).endswith(f"Once upon ‖{'ab' * 300} ...\n```")


def test_the_report_says_what_was_measured_and_of_what(tmp_path: Path) -> None:
    write_evaluation_report(tmp_path, EVALUATION)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Evaluation of runs/x/model\n\n1,234,567 parameters, adapters included; 2,000,000 bytes")
    assert "included: -; peak memory in evaluation (resident set of the process): 3 MiB. Identity of the" in text
    assert evaluation_table(EVALUATION) in text and text.endswith(samples_section(EVALUATION.samples) + "\n")
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- boolq: boolq.jsonl, SHA-256 cd",
        "- hellaswag: hellaswag.jsonl, SHA-256 ef",
        "- wikitext2: wiki.txt, SHA-256 01",
    ]


def test_a_report_of_nothing_but_its_model_is_one_paragraph(tmp_path: Path) -> None:
    write_evaluation_report(tmp_path, replace(EVALUATION, tasks={}, texts=(), samples=()))
    assert len((tmp_path / "report.md").read_text().splitlines()) == 3


def test_an_evaluation_comes_back_from_its_file(tmp_path: Path) -> None:
    EVALUATION.write(tmp_path / "evaluation.json")
    assert Evaluation.read(tmp_path / "evaluation.json") == EVALUATION


def test_what_only_the_harness_says_has_a_table_of_its_own() -> None:
    metrics = {"gsm8k": {"exact_match,strict-match": 0.125}, "boolq": {"acc": 0.5}}
    asked = {"gsm8k": HarnessTask({"few_shot": 5}, metrics)}
    _, of_harness, _ = evaluation_table(replace(EVALUATION, harness=asked)).split("\n\n")
    assert cells(of_harness)[2:] == [["gsm8k", "exact_match,strict-match", "0.1250"]]
