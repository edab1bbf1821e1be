"""`qpruner evaluate`: measures what a model can do, in numbers that are comparable with published ones."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from qpruner.datamodules.choice_tasks import Part, TaskQuestions, read_task
from qpruner.datamodules.questions import Measure, find_task
from qpruner.datamodules.stories import ending_questions
from qpruner.errors import UserError
from qpruner.evaluation.devices import launch
from qpruner.evaluation.evaluator import Evaluator, check_unused, positions_of
from qpruner.evaluation.generation import PROMPTS
from qpruner.evaluation.harness import Harness
from qpruner.evaluation.protocols import Protocol, read_text
from qpruner.evaluation.subject import Subject, compressed_folder, read_subject_config
from qpruner.options.functions import run_function
from qpruner.pretrained import DType
from qpruner.records.evaluation_report import REPORT, evaluation_table
from qpruner.stories import generate_stories

ENDINGS: Mapping[str, Literal["untold", "told"]] = {"endings": "untold", "confusions": "told"}
"""Tasks of the embedded stories, which need no files, and the kind of their wrong ending; see `ending_questions`."""
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
    separator: str = "\n\n",
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
    """Measures accuracy on tasks, perplexity of texts, and how a model writes; repeat the command to continue.

    Args:
        model: folder of a run, of a compressed model or of a model of transformers, a hub name, or qpruner/stories.
        tasks: names of choice tasks, separated by spaces or commas: boolq, piqa, hellaswag, winogrande, arc_easy,
            arc_challenge, openbookqa, or endings and confusions, which are about the embedded stories; with --harness,
            any task of lm-evaluation-harness, such as mmlu or gsm8k.
        harness: whether lm-evaluation-harness asks the questions and scores the answers (pip install 'qpruner[eval]').
        few_shot: number of solved examples before each question of the harness; by default, what the task defines.
        folder: folder with the questions, in FOLDER/TASK/validation.jsonl and test.jsonl; by default, the harness takes
            them from the hub.
        split: part of a task's questions: test, validation, or all; a task with a single file is divided into halves
            for test and validation; the harness uses the split that each of its tasks defines.
        items: maximum number of questions of a task, taken from the beginning.
        texts: texts to measure perplexity on, each NAME=FILE or NAME=HUB_NAME:CONFIG@SPLIT.
        lengths: numbers of tokens in the windows that texts are cut into, such as 128 2048; by default 2048, or the
            maximum length of the model if that is smaller.
        stride: number of tokens from the beginning of a window to that of the next; by default, windows do not overlap.
        separator: text between two records of a text; GPTQ and SparseGPT join PTB and C4 by a space.
        new_tokens: maximum number of tokens that the model generates after each prompt; 0 for none.
        prompts: texts for the model to continue; by default, four short ones.
        output: folder for the results; by default RUN/evaluation, or runs/evaluations/MODEL.
        restart: whether to discard earlier results and measure again.
        batch_tokens: maximum number of tokens in a batch, including padding; does not affect results.
        dtype: dtype of the weights of a model that is not compressed.
        accelerator: kind of device: auto, cpu, gpu, ...
        devices: number of devices that share the work, each with the whole model.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: something is missing or out of range, or there is nothing to do.
    """
    at_least = {"items": (items, 1), "few-shot": (few_shot, 0), "new-tokens": (new_tokens, 0)}
    _check_least(at_least | {"batch-tokens": (batch_tokens, 1), "devices": (devices, 1)})
    names = _without_repetition("--tasks", [name for word in tasks for name in word.split(",") if name])
    named_texts = [_named(text) for text in texts]
    _without_repetition("--texts", [name for name, _ in named_texts])
    if not (names or texts or new_tokens):
        raise UserError("There is nothing to measure: give --tasks, --texts, or --new-tokens above 0.")
    if (lengths or stride is not None) and not texts:
        raise UserError("--lengths and --stride say how to cut --texts, and there are none. Give --texts NAME=FILE.")
    protocols = [Protocol(length, stride) for length in dict.fromkeys(lengths)]
    folder = None if folder is None else folder.expanduser()
    opened = None
    if harness:
        if devices > 1:
            raise UserError("The harness works on one device here. Give --devices 1, or leave --harness out.")
        if split != "test":
            raise UserError(f"--split is {split}, and the harness takes the split that each task names. Leave it out.")
        opened = Harness.open(names, folder)
    elif few_shot is not None:
        raise UserError("--few-shot is for tasks of the harness. Give --harness, or leave it out.")
    questions = {} if harness else {name: _questions(name, folder, split, items) for name in names}
    whole_texts = {name: read_text(spec, separator) for name, spec in named_texts}

    processes = launch(accelerator, devices)
    place = output.expanduser() if output else _place(model)
    processes.of_first(lambda: check_unused(place))
    if texts and not protocols:
        config = read_subject_config(model, trust_remote_code=trust_remote_code)
        protocols = [Protocol(min(DEFAULT_LENGTH, positions_of(config)), stride)]
    subject = Subject.load(model, dtype=dtype, trust_remote_code=trust_remote_code, say=processes.say)
    evaluator = Evaluator(subject, processes, place, batch_tokens=batch_tokens, restart=restart)

    # Everything is cut and checked before anything is measured.
    examples = {}
    for name, (measure, given) in questions.items():
        if evaluator.has_answered(name, given, split):
            processes.say(f"{name}: {len(given.questions):,} questions were answered before.")
        else:
            examples[name] = evaluator.tokenize(name, measure, given)
    windows = {name: evaluator.windows(name, text, protocols) for name, text in whole_texts.items()}
    if new_tokens:
        evaluator.check_prompts(prompts or PROMPTS, new_tokens)

    for name, answered in examples.items():
        evaluator.task(answered, questions[name][1].source, split)
    if opened is not None:
        evaluator.tasks_of_harness(opened, names, folder=folder, items=items, few_shot=few_shot)
    for name, cut in windows.items():
        evaluator.text(name, whole_texts[name].source, cut)
    if new_tokens:
        evaluator.write_samples(prompts or PROMPTS, new_tokens)
    processes.say("\n\n".join(filter(None, (evaluation_table(evaluator.evaluation), f"Report: {place / REPORT}"))))


def _check_least(options: Mapping[str, tuple[int | None, int]]) -> None:
    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}.")


def _without_repetition(option: str, names: list[str]) -> list[str]:
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{option} names {twice[0]!r} twice; give each once.")
    return names


def _questions(name: str, folder: Path | None, part: Part, items: int | None) -> tuple[Measure, TaskQuestions]:
    if name in ENDINGS:
        if part == "all":
            raise UserError(
                f"--split is all, and the stories of {name} are of validation or of test. Give one of these, and "
                f"evaluate other tasks apart."
            )
        stories = generate_stories(
            part,
            num_stories=items or NUM_ENDINGS,
            seed=list(ENDINGS).index(name),
        )
        questions = ending_questions(list(stories), seed=0, other=ENDINGS[name])
        content = questions.fingerprint()["sha256"][:16]  # other versions of the stories have other endings
        return "acc", replace(questions, source=f"{questions.source} sha256:{content}")
    measure = find_task(name).measure
    if folder is None:
        raise UserError(
            f"The questions of {name!r} are read from files: give --folder, which has {name}/test.jsonl, or --harness "
            f"to take them from the hub."
        )
    return measure, read_task(folder, name, part, items)


def _named(text: str) -> tuple[str, str]:
    name, equals, spec = text.partition("=")
    if not (name and equals and spec):
        raise UserError(f"--texts has {text!r}; give each text a name: wikitext2={text}.")
    return name, spec


def _place(model: str) -> Path:
    """The default folder for the results."""
    folder = Path(model).expanduser()
    if folder.is_dir() and compressed_folder(model) not in (None, folder):  # that of a run
        return folder / "evaluation"
    # A name of the hub has the parts OWNER and MODEL.
    parts = (folder.resolve() if folder.is_dir() else folder).parts
    return Path("runs", "evaluations", "--".join(part for part in parts if part != "/"))
