"""Evaluates a model part by part; each part is saved before the next begins, and is not measured again."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import Precision
from tqdm import tqdm

from qpruner.datamodules.base import DEFAULT_POSITIONS
from qpruner.datamodules.choice_tasks import Part, TaskQuestions
from qpruner.datamodules.choices import ChoiceExamples
from qpruner.datamodules.loader import EvaluationLoader
from qpruner.datamodules.questions import Measure
from qpruner.errors import UserError
from qpruner.evaluation.generation import generate_samples, prompt_tokens
from qpruner.evaluation.harness import Harness
from qpruner.evaluation.protocols import (
    Protocol,
    WholeText,
    Windows,
    check_fits,
    check_vocabulary,
    score_text,
    tokens_of,
)
from qpruner.evaluation.subject import Subject
from qpruner.files import check_place
from qpruner.memory import check_room, num_parameters, peak_meaning, read_peak, reset_peak, tensor_bytes
from qpruner.processes import Processes
from qpruner.records.evaluation import (
    ITEMS,
    Evaluation,
    HarnessTask,
    Item,
    TaskScore,
    accuracies,
    items_file,
    write_items,
)
from qpruner.records.evaluation_report import write_evaluation_report
from qpruner.training.evaluation import Measures

LOCK = ".lock"
"""File that is locked while an evaluation is written beside it."""
HARNESS_TOKENS = 256
"""Assumed tokens in a text of the harness, to convert a batch size in tokens to one in texts."""


def check_unused(folder: Path) -> None:
    """Makes sure, before a model is loaded, that its results can be written into a folder, without making anything.

    Raises:
        UserError: the folder cannot be written or is in use.
    """
    check_place(folder)
    if os.path.lexists(folder / LOCK):
        lock = _lock_of(folder)
        _acquire(lock, folder)
        lock.release()


def positions_of(config: Any) -> int:
    """Maximum number of positions of a model, or an assumed one where its configuration does not state it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or DEFAULT_POSITIONS


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder / LOCK, timeout=0)


def _acquire(lock: FileLock, folder: Path) -> None:
    """Locks a folder for results, which is made if it is not there.

    Raises:
        UserError: the folder cannot be written or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"Another process writes its results into {str(folder)!r}. Wait for it, or give another --output."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot write into {str(folder)!r} ({error}). Give another --output.") from error


class Evaluator:
    """Measures a model and stores the results in a folder.

    Args:
        subject: model to evaluate.
        processes: processes that share the work, each with the whole model.
        folder: folder of ``evaluation.json`` and ``items/``.
        batch_tokens: maximum tokens in a batch, padding included; does not affect results.
        restart: whether to discard earlier results in the folder and measure again.

    Raises:
        UserError: the folder holds an evaluation of other weights, cannot be written or is in use, or the model does
            not fit on the device.
    """

    def __init__(
        self, subject: Subject, processes: Processes, folder: Path, *, batch_tokens: int, restart: bool = False
    ) -> None:
        self.subject = subject
        self.processes = processes
        self.folder = folder
        self.batch_tokens = batch_tokens
        check_room(subject.network, processes.device, "Use a larger device or --dtype bfloat16.")
        subject.network.to(processes.device)
        self.measures = Measures(processes.device)  # of all tasks: tests only once if trees are read
        self._lock = _lock_of(folder)
        self.evaluation = processes.of_first(lambda: self._begin(restart))
        reset_peak(processes.device)

    @property
    def path(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def positions(self) -> int:
        """Maximum number of positions of the model; see `positions_of`."""
        return positions_of(self.subject.network.config)

    def has_answered(self, name: str, questions: TaskQuestions, part: Part) -> bool:
        """Whether the questions of a task were answered before, and the answers are still on disk.

        Args:
            name: name of the task.
            questions: questions of the task.
            part: part of the task's questions that these are.
        """
        before = self.evaluation.tasks.get(name)
        wanted = (len(questions.questions), questions.source, part)
        is_known = before is not None and (before.items, before.source, before.split) == wanted
        return is_known and self.processes.of_first(items_file(self.folder, name).exists)

    def tokenize(self, name: str, measure: Measure, questions: TaskQuestions) -> ChoiceExamples:
        """Tokenizes questions, truncated to the model's maximum length, as input for `task`.

        Args:
            name: name of the task.
            measure: measure by which the task is reported.
            questions: questions of the task.

        Raises:
            UserError: an option is longer than the model's maximum length, or a token is outside its vocabulary.
        """
        tokenizer = self.subject.tokenizer
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
        examples = ChoiceExamples.of(name, measure, questions, tokenizer, max_length=self.positions, pad_token=pad)
        check_vocabulary(self.subject.network, examples.rows.tokens, f"The questions of {name!r} have")
        if examples.cut:
            self.processes.say(f"{name}: {examples.cut:,} of {len(examples):,} questions lose their beginning to fit.")
        return examples

    def task(self, examples: ChoiceExamples, source: str, part: Part) -> None:
        """Answers the questions of a task.

        Args:
            examples: the questions, from `tokenize`.
            source: where the questions come from.
            part: part of the task's questions that these are.
        """
        since = time.perf_counter()
        items = self._answer(examples)
        if self.processes.is_first:
            name, seconds = examples.task, time.perf_counter() - since
            share = accuracies(items)
            score = TaskScore(
                len(items), share["acc"], share["acc_norm"], examples.measure, source, split=part, seconds=seconds
            )
            write_items(items_file(self.folder, name), items)
            self._keep(tasks={**self.evaluation.tasks, name: score})

    def tasks_of_harness(
        self, harness: Harness, tasks: Sequence[str], *, folder: Path | None, items: int | None, few_shot: int | None
    ) -> None:
        """Runs tasks or groups with lm-evaluation-harness one by one, skipping those that were measured before.

        Args:
            harness: harness that was opened for these tasks.
            tasks: names of tasks or groups of the harness.
            folder: folder with local records; None for those of the hub.
            items: maximum number of items of a task, the first ones; None for all.
            few_shot: number of solved examples before each question; None for the task's own number.

        Raises:
            UserError: the records of a task cannot be loaded.
        """
        assert self.processes.world_size == 1
        for task in tasks:
            options = {
                "folder": None if folder is None else str(folder),
                "records": harness.source(task),
                "items": items,
                "few_shot": few_shot,
            }
            before = self.evaluation.harness.get(task)
            if before is not None and before.options == options:
                self.processes.say(f"{task}: measured before.")
                continue
            results = harness.run(
                self.subject.network,
                self.subject.tokenizer,
                task,
                limit=items,
                batch_size=max(1, self.batch_tokens // HARNESS_TOKENS),
                num_fewshot=few_shot,
            )
            scores = {name: result.score for name, result in results.items() if result.score is not None}
            for name in scores:
                write_items(items_file(self.folder, name), results[name].items)
            metrics = {name: result.metrics for name, result in results.items()}
            self._keep(
                tasks={**self.evaluation.tasks, **scores},
                harness={**self.evaluation.harness, task: HarnessTask(options, metrics)},
            )

    @torch.no_grad()
    def _answer(self, examples: ChoiceExamples) -> list[Item]:
        """The model's log-likelihoods for the options of each question, in the order of the questions."""
        processes = self.processes
        loader = EvaluationLoader(
            examples, tokens=self.batch_tokens, rank=processes.rank, world_size=processes.world_size
        )
        most = int(examples.first_option.diff().max())
        scores = torch.zeros(len(examples), most, dtype=torch.float64, device=processes.device)
        for batch in tqdm(loader, examples.task, disable=not processes.is_first, leave=False):
            moved = move_data_to_device(batch, processes.device)
            real = moved["example"] >= 0
            answers = self.measures.option_log_likelihoods(self.subject.network, moved)[real]
            scores[moved["example"][real], : answers.shape[1]] = answers
        rows = processes.reduce(scores).tolist()  # each question was answered by one process, and is 0 on all others
        bounds = examples.first_option.tolist()
        return [
            Item(name, gold, tuple(row[: end - begin]), tuple(examples.lengths[begin:end].tolist()))
            for name, gold, row, begin, end in zip(
                examples.names.tolist(), examples.gold.tolist(), rows, bounds, bounds[1:], strict=False
            )
        ]

    def windows(self, name: str, text: WholeText, protocols: Sequence[Protocol]) -> list[Windows]:
        """Cuts a text by each protocol that was not measured before, as input for `text`.

        Args:
            name: name of the text.
            text: the text.
            protocols: ways to cut the text.

        Raises:
            UserError: the text does not fill a window, a window is longer than the model's maximum length, or a token
                is outside the model's vocabulary.
        """
        done = {(score.name, score.protocol, score.source) for score in self.evaluation.texts}
        left = [protocol for protocol in protocols if (name, protocol.name, text.source) not in done]
        if not left:
            self.processes.say(f"{name}: measured before.")
            return []
        row = tokens_of(self.subject.tokenizer, text.text)
        windows = [Windows.of(row, protocol) for protocol in left]
        for each in windows:
            check_fits(self.subject.network, each)
        return windows

    def text(self, name: str, source: str, windows: Sequence[Windows]) -> None:
        """Measures the perplexity of a text.

        Args:
            name: name of the text.
            source: where the text comes from.
            windows: the text, cut in one way or several, from `windows`.
        """
        for each in windows:
            score = score_text(
                self.subject.network,
                each,
                name=name,
                source=source,
                pad_token=0,
                tokens_per_batch=self.batch_tokens,
                device=self.processes.device,
                precision=Precision(),
                processes=self.processes,
                progress=self.processes.is_first,
            )
            if self.processes.is_first:
                cut = (name, each.protocol.name)
                others = (before for before in self.evaluation.texts if (before.name, before.protocol) != cut)
                self._keep(texts=(*others, score))

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Makes sure that the model can continue some prompts.

        Raises:
            UserError: a prompt has no tokens, or exceeds the model's positions together with the new tokens.
        """
        for prompt in prompts:
            prompt_tokens(self.subject.network, self.subject.tokenizer, prompt, max_new_tokens)

    def write_samples(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Generates samples from the model, on the first process.

        Args:
            prompts: texts to continue.
            max_new_tokens: maximum number of tokens to generate after each prompt.
        """
        if self.processes.is_first:
            samples = generate_samples(
                self.subject.network, self.subject.tokenizer, prompts, max_new_tokens=max_new_tokens
            )
            self._keep(samples=tuple(samples))

    def _begin(self, restart: bool) -> Evaluation:
        subject, device = self.subject, self.processes.device
        new = Evaluation(
            subject.name,
            subject.identity,
            num_parameters(subject.network),
            tensor_bytes(subject.network),
            subject.average_bits,
            peak_meaning(device),
            None,
            {},
            (),
            (),
            {},
        )
        _acquire(self._lock, self.folder)  # until the process ends
        if restart:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / ITEMS, ignore_errors=True)
        if not self.path.exists():
            return new
        before = Evaluation.read(self.path)
        if before.identity != new.identity:
            raise UserError(
                f"{str(self.path)!r} holds an evaluation of other weights, those of {before.model!r}. Give another "
                f"--output, or --restart to measure anew."
            )
        same = before.peak_of == new.peak_of
        return replace(
            before, model=new.model, peak_of=new.peak_of, peak_inference=before.peak_inference if same else None
        )

    def _keep(self, **parts: Any) -> None:
        peaks = [
            peak for peak in (self.evaluation.peak_inference, read_peak(self.processes.device)) if peak is not None
        ]
        self.evaluation = replace(self.evaluation, **parts, peak_inference=max(peaks, default=None))
        self.evaluation.write(self.path)
        write_evaluation_report(self.folder, self.evaluation)
