"""What all data modules share: tokenized splits, their cache, resumable loaders and calibration sequences."""

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from qpruner.anatomy import learned_positions
from qpruner.datamodules.cache import Prepared, cache_path, default_cache_dir, load, store
from qpruner.datamodules.choice_tasks import ChoiceTasksConfig, TaskQuestions, read_task
from qpruner.datamodules.choices import ChoiceExamples
from qpruner.datamodules.loader import EvaluationLoader, Examples, ResumableLoader
from qpruner.datamodules.questions import Measure, find_task
from qpruner.datamodules.rows import TextExamples
from qpruner.datamodules.splits import SPLITS, Split
from qpruner.datamodules.tokens import tokenizer_fingerprint
from qpruner.errors import UserError, check_ranges
from qpruner.files import hash_json
from qpruner.pretrained import load_tokenizer
from qpruner.seeds import derive_seed

FORMAT = 2  # raised when the same text and options begin to give other rows, so that old caches are left alone
DEFAULT_POSITIONS = 2048  # of a model that does not say how many it knows, as lm-evaluation-harness assumes


@dataclass(frozen=True)
class LoaderConfig:
    """How rows become batches.

    Args:
        batch_size: rows in a training batch, on each device.
        eval_tokens_per_batch: most tokens in a batch of validation, test and prediction, padding included, on each
            device; an example is never taken apart, so that an example of more tokens is a batch of its own. Changes no
            result.
        num_workers: processes that prepare batches ahead; 0 prepares them in the training process. Changes no result.
    """

    batch_size: int = 8
    eval_tokens_per_batch: int = 4096
    num_workers: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "loader",
            batch_size=("at least 1", self.batch_size >= 1),
            eval_tokens_per_batch=("at least 1", self.eval_tokens_per_batch >= 1),
            num_workers=("at least 0", self.num_workers >= 0),
        )


class TokenDataModule(LightningDataModule):
    """A data module whose splits are rows of tokens.

    Train fits and calibrates, validation chooses, test is reported. Set ``Trainer(use_distributed_sampler=False)``: the
    loaders share the rows among the ranks themselves.

    Args:
        tokenizer: folder or hub name of the tokenizer; on the command line that of the model.
        max_length: tokens in a row, at least 2; longer ones are cut.
        loader: how rows become batches.
        cache_dir: where tokenized splits are kept for the next run; default ``~/.cache/qpruner/tokens``.
        seed: seed of the training order and of what is drawn for calibration; on the command line
            ``--seed_everything``.
        tasks: choice tasks that validation and test bring besides text; None for none.
        trust_remote_code: whether code that comes with the tokenizer may run; on the command line that of the model.

    Raises:
        UserError: ``max_length`` below 2.
    """

    def __init__(
        self,
        tokenizer: str,
        max_length: int = 256,
        loader: LoaderConfig = LoaderConfig(),  # frozen
        cache_dir: str | None = None,
        seed: int = 0,
        tasks: ChoiceTasksConfig | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if max_length < 2:
            raise UserError(f"max_length is {max_length}; a row needs at least 2 tokens, one to predict the other.")
        self.max_length = max_length
        self.loader = loader
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self.seed = seed
        self.tasks = tasks
        self.tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        self._prepared: Prepared | None = None
        self._vocabulary: int | None = None  # tokens that the model knows, once that is told
        self._positions = DEFAULT_POSITIONS  # positions that the model knows, once that is told
        self._learned_positions: int | None = None  # length of the model's table of positions, where it has one
        self._choices: dict[tuple[Split, int, int], list[ChoiceExamples]] = {}

    # What a data module must say.

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Plain data that, with the tokenizer, determine the rows."""

    @abstractmethod
    def build(self) -> Prepared:
        """Reads and tokenizes; called once, then the cache answers."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """How text is laid out in rows, as stated beside a perplexity."""

    def questions(self, split: Split) -> dict[str, tuple[Measure, TaskQuestions]]:
        """The choice tasks of validation or test, by name: what each is reported by, and its questions.

        Raises:
            UserError: the files of a task are not as they should be.
        """
        if self.tasks is None or split == "train":
            return {}
        return {
            name: (
                find_task(name).measure,
                read_task(Path(self.tasks.folder).expanduser(), name, split, self.tasks.items),
            )
            for name in self.tasks.names
        }

    # What they share.

    @property
    def pad_token(self) -> int:
        wanted = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((i for i in wanted if i is not None and (self._vocabulary is None or i < self._vocabulary)), 0)

    def choices(self, split: Split) -> list[ChoiceExamples]:
        """The choice tasks of a split as tokens, cut to the positions that the model knows."""
        key = (split, self._positions, self.pad_token)
        if key not in self._choices:
            self._choices[key] = [
                ChoiceExamples.of(
                    name, measure, task, self.tokenizer, max_length=self._positions, pad_token=self.pad_token
                )
                for name, (measure, task) in self.questions(split).items()
            ]
            for examples in self._choices[key]:
                if examples.cut:
                    rank_zero_info(
                        f"{examples.task}: {examples.cut} of {len(examples)} questions are longer than the "
                        f"{self._positions} positions of the model, and lose their beginning."
                    )
        return self._choices[key]

    def check_model(self, config: Any) -> None:
        """Hears of the model: makes sure that it has an embedding for every token of the data, and for every position.

        What counts is the tokens of the rows: many tokenizers know a few more than their model, which no text has, and
        padding is masked, so that any token may stand there.

        Args:
            config: configuration of the model.

        Raises:
            UserError: the data have a token that it does not know, or rows longer than its table of positions.
        """
        config = config.get_text_config()
        self._learned_positions = learned_positions(config)
        if self._learned_positions is not None and self.max_length > self._learned_positions:
            raise UserError(
                f"max_length is {self.max_length}, and the model has a table of {self._learned_positions} positions. "
                f"Give --data.max_length {self._learned_positions}."
            )
        size = config.vocab_size
        self._positions = getattr(config, "max_position_embeddings", None) or DEFAULT_POSITIONS
        if size == self._vocabulary:
            return
        if max(self.tokenizer.get_vocab().values(), default=-1) >= size:  # only then are the rows read through
            rows = [*self.prepared.splits.values()]
            rows += [choices.rows for split in SPLITS for choices in self.choices(split)]
            highest = max((int(part.tokens.max()) for part in rows if len(part.tokens)), default=-1)
            if highest >= size:
                raise UserError(
                    f"The data have the token {highest} ({self.tokenizer.convert_ids_to_tokens(highest)!r}); the "
                    f"tokenizer {self.tokenizer.name_or_path!r} has {len(self.tokenizer):,} tokens, and the embedding "
                    f"of the model has {size:,} rows. Give the model the tokenizer that it was trained with."
                )
        self._vocabulary = size

    @cached_property
    def key(self) -> str:
        """The name of the rows in the cache; found once, because it reads the data through."""
        return hash_json(
            [FORMAT, type(self).__name__, self.max_length, tokenizer_fingerprint(self.tokenizer), self.options()]
        )

    def prepare_data(self) -> None:
        """Tokenizes into the cache, unless that was done before; Lightning calls it in one process a machine."""
        path = cache_path(self.cache_dir, self.key)
        if not path.exists():
            store(path, self.build())

    def setup(self, stage: str | None = None) -> None:
        if self._prepared is None:
            self._prepared = load(cache_path(self.cache_dir, self.key))
            for note in self._prepared.notes:
                rank_zero_info(note)

    @property
    def prepared(self) -> Prepared:
        if self._prepared is None:
            self.prepare_data()
            self.setup()
        assert self._prepared is not None
        return self._prepared

    def examples(self, split: Split) -> TextExamples:
        """The rows of a split.

        Raises:
            UserError: there are no data for it.
        """
        if split not in self.prepared.splits:
            raise UserError(f"There is no {split} data: give --data.init_args.{split}.")
        return TextExamples(self.prepared.splits[split], self.pad_token)

    def fingerprint(self) -> dict[str, Any]:
        """What the manifest of a run says of its data."""
        texts = {
            split: {
                "rows": len(rows),
                "tokens": len(rows.tokens),
                "sha256": sha256(rows.tokens.numpy().tobytes()).hexdigest(),
            }
            for split, rows in self.prepared.splits.items()
        }
        tasks = {
            f"{split} tasks": {name: task.fingerprint() for name, (_, task) in questions.items()}
            for split in SPLITS
            if (questions := self.questions(split))
        }
        return texts | tasks

    def for_another_trainer(self, seed: int | None = None, *, keep_rows: bool = True) -> Self:
        """The same data, that no Trainer knows yet; this data module stays as it is.

        Args:
            seed: seed of the training order; by default that of this data module.
            keep_rows: whether the copy has the rows that this data module has read; otherwise it reads them from the
                cache, as where it is sent to another process.
        """
        other = copy.copy(self)
        other.trainer = None
        other.seed = self.seed if seed is None else seed
        other._choices = dict(self._choices) if keep_rows else {}
        if not keep_rows:
            other._prepared = None
        return other

    def train_dataloader(self) -> ResumableLoader:
        """This rank's loader of the training rows; alone in the world when no Trainer is attached.

        Raises:
            UserError: the number of micro-batches to an optimizer step changes in the course of the fit.
        """
        callbacks: list[Any] = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
            raise UserError(
                "GradientAccumulationScheduler changes the number of micro-batches to an optimizer step in the course "
                "of a fit, and then the tokens of a step cannot be weighed alike. Give one number for all of the fit: "
                "--trainer.accumulate_grad_batches."
            )
        return ResumableLoader(
            self.examples("train"),
            batch_size=self.loader.batch_size,
            seed=self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
            num_workers=self.loader.num_workers,
            limit=self.trainer.limit_train_batches if self.trainer else None,
            accumulate=self.trainer.accumulate_grad_batches if self.trainer else 1,
            position=partial(position, self.trainer),
        )

    def num_steps(self) -> float:
        """Optimizer steps of the attached Trainer's fit; infinite where only time ends it.

        It says what ``Trainer.estimated_stepping_batches`` does, and leaves the Trainer as it is.
        """
        assert self.trainer is not None
        most = math.inf if self.trainer.max_steps == -1 else self.trainer.max_steps
        if self.trainer.max_epochs in (None, -1):
            return most
        return min(most, self.train_dataloader().steps * max(self.trainer.max_epochs, 1))

    def val_dataloader(self) -> list[EvaluationLoader]:
        # A fit without validation data is legal; `qpruner validate` without them is not.
        if self.trainer and self.trainer.state.fn == "fit" and not self.has("validation"):
            return []
        return self.evaluation_loaders("validation")

    def test_dataloader(self) -> list[EvaluationLoader]:
        return self.evaluation_loaders("test")

    def predict_dataloader(self) -> list[EvaluationLoader]:
        return self.evaluation_loaders("test")

    def has(self, split: Split) -> bool:
        """Whether a split has text or questions."""
        return split in self.prepared.splits or bool(self.choices(split))

    def evaluation_loaders(self, split: Split) -> list[EvaluationLoader]:
        """Every row of the split once over all ranks, then every question of its choice tasks, task by task."""
        choices = self.choices(split)
        sets: list[Examples] = [] if choices and split not in self.prepared.splits else [self.examples(split)]
        sets += choices
        return [
            EvaluationLoader(
                examples,
                tokens=self.loader.eval_tokens_per_batch,
                rank=self.trainer.global_rank if self.trainer else 0,
                world_size=self.trainer.world_size if self.trainer else 1,
                num_workers=self.loader.num_workers,
            )
            for examples in sets
        ]

    def calibration(self, num_sequences: int, length: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """This rank's share of the sequences on which scores and error compensation are computed.

        The sequences are the same whatever the number of ranks: drawn without repetition from the training rows that
        are long enough, each cut at a place of its own, then dealt to the ranks in turn. Where too few rows are long
        enough, as with short instructions, the training text is run together and cut anew.

        Args:
            num_sequences: sequences over all ranks, at least 1.
            length: tokens in each sequence, at least 2.
            rank: place of this process among all, from 0.
            world_size: number of processes.

        Raises:
            UserError: less training text than that, or sequences longer than the model's table of positions.
        """  # [num_sequences / world_size, length] int64
        if num_sequences < 1 or length < 2:
            raise UserError(f"Calibration needs at least 1 sequence of 2 tokens, not {num_sequences} of {length}.")
        if self._learned_positions is not None and length > self._learned_positions:
            raise UserError(
                f"Calibration asks for sequences of {length} tokens, and the model has a table of "
                f"{self._learned_positions} positions. Ask for shorter ones."
            )
        rows = self.examples("train").rows
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "calibration"))
        long_enough = (rows.lengths >= length).nonzero().flatten()
        if len(long_enough) >= num_sequences:
            chosen = long_enough[torch.randperm(len(long_enough), generator=generator)[:num_sequences]]
            slack = rows.lengths[chosen] - length
            starts = rows.offsets[chosen] + (torch.rand(len(chosen), generator=generator) * (slack + 1)).long()
        elif (pieces := len(rows.tokens) // length) >= num_sequences:
            starts = torch.randperm(pieces, generator=generator)[:num_sequences] * length
        else:
            raise UserError(
                f"Calibration asks for {num_sequences} sequences of {length} tokens; the {len(rows)} training rows "
                f"have {len(rows.tokens):,} tokens, enough for {pieces}. Ask for fewer or shorter ones, or give more "
                f"text."
            )
        mine = starts[rank::world_size]
        return rows.tokens[mine[:, None] + torch.arange(length)].long()


def position(trainer: Trainer | None) -> tuple[int, int]:
    """The epoch that the fit of a Trainer is in, and how many of its batches were read."""
    if trainer is None:
        return 0, 0
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
