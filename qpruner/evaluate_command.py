"""`qpruner evaluate`: what a model can do, in figures that compare with those of others."""

from pathlib import Path

from qpruner.datamodules.choice_tasks import Part, TaskQuestions, read_task
from qpruner.datamodules.questions import Measure, find_task
from qpruner.datamodules.stories import ending_questions
from qpruner.errors import UserError
from qpruner.evaluation.devices import launch
from qpruner.evaluation.evaluator import Evaluator
from qpruner.evaluation.generation import PROMPTS
from qpruner.evaluation.protocols import Protocol, read_text
from qpruner.evaluation.subject import Subject, compressed_folder
from qpruner.options.functions import run_function
from qpruner.pretrained import DType
from qpruner.records.evaluation_report import evaluation_table, write_evaluation_report
from qpruner.stories import generate_stories

ENDINGS = "endings"
"""The task of the embedded stories, which needs no file."""
NUM_ENDINGS = 1000
DEFAULT_LENGTH = 2048


def evaluate_command(arguments: list[str]) -> None:
    run_function("qpruner evaluate", evaluate, arguments)


def evaluate(
    model: str,
    *,
    tasks: list[str] = [],  # noqa: B006  # read alone
    harness: bool = False,
    few_shot: int | None = None,
    folder: Path | None = None,
    split: Part = "test",
    items: int | None = None,
    texts: list[str] = [],  # noqa: B006  # read alone
    lengths: list[int] = [],  # noqa: B006  # read alone
    stride: int | None = None,
    new_tokens: int = 64,
    prompts: list[str] = [],  # noqa: B006  # read alone
    output: Path | None = None,
    restart: bool = False,
    batch_tokens: int = 4096,
    dtype: DType = "auto",
    accelerator: str = "auto",
    devices: int = 1,
    trust_remote_code: bool = False,
) -> None:
    """Measures accuracy on tasks, perplexity of texts, and how a model writes; repeating the command goes on.

    Args:
        model: folder of a run, of a compressed model or of a model of transformers, a hub name, or qpruner/stories.
        tasks: names of choice tasks, apart by spaces or commas: boolq, piqa, hellaswag, winogrande, arc_easy,
            arc_challenge, openbookqa, or endings, of the embedded stories; with --harness any task of
            lm-evaluation-harness, such as mmlu or gsm8k.
        harness: whether lm-evaluation-harness asks the questions and scores the answers (pip install 'qpruner[eval]').
        few_shot: number of solved examples before each question of the harness; by default what the task says.
        folder: folder with the questions, FOLDER/TASK/validation.jsonl and test.jsonl; the harness takes those of the
            hub where there is none.
        split: part of a task's questions: test, validation, or all; of one file, half chooses and half is reported.
        items: most questions of a task, the first ones.
        texts: texts to measure perplexity on, each NAME=FILE or NAME=HUB_NAME:CONFIG@SPLIT.
        lengths: tokens of the windows that texts are cut into, such as 128 2048; by default 2048, or the longest that
            the model knows.
        stride: tokens between the beginnings of two windows; by default windows follow each other.
        new_tokens: most tokens that the model writes behind each prompt; 0 for none.
        prompts: texts that the model goes on with; by default four short ones.
        output: folder of the results; by default RUN/evaluation, or runs/evaluations/MODEL.
        restart: whether to measure again what was measured before.
        batch_tokens: most tokens in a batch, padding included; changes no result.
        dtype: number format of the weights of a model that is not compressed.
        accelerator: kind of device: auto, cpu, gpu, ...
        devices: number of devices that share the work, each with the whole model.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: something is not there, or there is nothing to do.
    """
    protocols = [Protocol(length, stride) for length in lengths]
    names = [name for word in tasks for name in word.split(",") if name]
    questions = {} if harness else {name: _questions(name, folder, split, items) for name in names}
    whole_texts = {name: read_text(spec) for name, spec in map(_named, texts)}
    if not (names or whole_texts or new_tokens):
        raise UserError("There is nothing to measure: give --tasks, --texts, or --new-tokens above 0.")
    processes = launch(accelerator, devices)
    subject = Subject.load(model, dtype=dtype, trust_remote_code=trust_remote_code)
    place = output or _place(model)
    evaluator = Evaluator(subject, processes, place, batch_tokens=batch_tokens, restart=restart)
    for name, (measure, given) in questions.items():
        evaluator.task(name, measure, given, split)
    if harness and names:
        evaluator.tasks_of_harness(names, folder=folder, items=items, few_shot=few_shot)
    for name, text in whole_texts.items():
        evaluator.text(name, text, protocols or [Protocol(min(DEFAULT_LENGTH, evaluator.positions), stride)])
    if new_tokens:
        evaluator.write_samples(prompts or PROMPTS, new_tokens)
    if processes.is_first:
        write_evaluation_report(place, evaluator.evaluation)
        print(f"\n{evaluation_table(evaluator.evaluation)}\n\nReport: {place / 'report.md'}")


def _questions(name: str, folder: Path | None, part: Part, items: int | None) -> tuple[Measure, TaskQuestions]:
    if name == ENDINGS:
        stories = generate_stories(
            "validation" if part == "validation" else "test", num_stories=items or NUM_ENDINGS, seed=0
        )
        return "acc", ending_questions(list(stories), seed=0)
    measure = find_task(name).measure
    if folder is None:
        raise UserError(
            f"The questions of {name!r} are read from files: give --folder, which has {name}/test.jsonl, or --harness "
            f"to take them from the hub."
        )
    return measure, read_task(folder.expanduser(), name, part, items)


def _named(text: str) -> tuple[str, str]:
    name, equals, spec = text.partition("=")
    if not (name and equals and spec):
        raise UserError(f"--texts has {text!r}; give each text a name: wikitext2={text}.")
    return name, spec


def _place(model: str) -> Path:
    """Where the results go unless told."""
    folder = Path(model).expanduser()
    if folder.is_dir() and compressed_folder(model) not in (None, folder):  # that of a run
        return folder / "evaluation"
    return Path("runs", "evaluations", "--".join(part for part in folder.parts if part not in ("/", "..", ".")))
