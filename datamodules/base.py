"""What all data modules share: tokenized splits and their cache, resumable loaders, and calibration sequences."""

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

FORMAT = 2  # raised when the same text and options begin to give different rows, so that old caches are not used
DEFAULT_POSITIONS = 2048  # of a model that does not say how many it supports, as lm-evaluation-harness assumes


@dataclass(frozen=True)
class LoaderConfig:
    """How rows become batches.

    Args:
        batch_size: number of rows in a training batch, on each device.
        eval_tokens_per_batch: most tokens in a batch of validation, test and prediction, padding included, on each
            device; an example is never split, so an example with more tokens becomes a batch of its own. Does not
            change any result.
        num_workers: number of processes that prepare batches ahead of time; 0 prepares them in the training process.
            Does not change any result.
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

    The training split is for fitting and calibration, the validation split for making choices, and the test split for
    reported results. Set ``Trainer(use_distributed_sampler=False)``: the loaders themselves distribute the rows over
    the ranks.

    Args:
        tokenizer: folder or hub name of the tokenizer; on the command line that of the model.
        max_length: most tokens in a row, at least 2; longer rows are truncated.
        loader: how rows become batches.
        cache_dir: folder in which tokenized splits are kept for the next run; default ``~/.cache/qpruner/tokens``.
        seed: seed of the training order and of the draws for calibration; on the command line ``--seed_everything``.
        tasks: choice tasks that validation and test have in addition to text; None for none.
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
        self._vocabulary: int | None = None  # number of tokens that the model knows, once known
        self._positions = DEFAULT_POSITIONS  # number of positions that the model supports, once known
        self._learned_positions: int | None = None  # length of the model's table of positions, if it has one
        self._choices: dict[tuple[Split, int, int], list[ChoiceExamples]] = {}

    # What a data module must define.

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Plain data that, together with the tokenizer, determine the rows."""

    @abstractmethod
    def build(self) -> Prepared:
        """Reads and tokenizes the data; called once, after which the cache is used."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """How text is laid out in rows, as stated next to a perplexity."""

    def questions(self, split: Split) -> dict[str, tuple[Measure, TaskQuestions]]:
        """The choice tasks of validation or test, by name: the measure that each is reported by, and its questions.

        Raises:
            UserError: the files of a task are invalid.
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
        """The choice tasks of a split as tokens, truncated to the number of positions that the model supports."""
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
        """Takes note of the model, and makes sure that it has an embedding for every token and position of the data.

        Only tokens that occur in rows count: many tokenizers have a few more tokens than their model, which occur in no
        text, and padding is masked, so that any token may serve for it.

        Args:
            config: configuration of the model.

        Raises:
            UserError: the data contain a token that the model does not know, or rows longer than its table of
                positions.
        """
        config = config.get_text_config()
        self._learned_positions = learned_positions(config)
        if self._learned_positions is not None and self.max_length > self._learned_positions:
            parts = [part for part in self.prepared.splits.values() if len(part)]
            longest = max((int(part.lengths.max()) for part in parts), default=0)
            if longest > self._learned_positions:
                raise UserError(
                    f"The longest row of the data has {longest} tokens, and the model has a table of "
                    f"{self._learned_positions} positions. Give --data.max_length {self._learned_positions}."
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
        """The key of the rows in the cache; computed once, because that reads all of the data."""
        return hash_json(
            [FORMAT, type(self).__name__, self.max_length, tokenizer_fingerprint(self.tokenizer), self.options()]
        )

    def prepare_data(self) -> None:
        """Tokenizes into the cache, unless that was done before; Lightning calls it in one process per machine."""
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
            UserError: there are no data for this split.
        """
        if split not in self.prepared.splits:
            raise UserError(f"There is no {split} data: give --data.init_args.{split}.")
        return TextExamples(self.prepared.splits[split], self.pad_token)

    def fingerprint(self) -> dict[str, Any]:
        """What the manifest of a run records about its data."""
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
        """A copy of the data module that is not attached to a Trainer; this data module stays as it is.

        Args:
            seed: seed of the training order; by default that of this data module.
            keep_rows: whether the copy has the rows that this data module has read; otherwise it reads them from the
                cache, as it should if it is sent to another process.
        """
        other = copy.copy(self)
        other.trainer = None
        other.seed = self.seed if seed is None else seed
        other._choices = dict(self._choices) if keep_rows else {}
        if not keep_rows:
            other._prepared = None
        return other

    def train_dataloader(self) -> ResumableLoader:
        """This rank's loader of the training rows; that of a single process if no Trainer is attached.

        Raises:
            UserError: the number of micro-batches per optimizer step changes during the fit.
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
        """Number of optimizer steps of the attached Trainer's fit; infinite if only time ends it.

        It gives the same as ``Trainer.estimated_stepping_batches``, and leaves the Trainer as it is.
        """
        assert self.trainer is not None
        most = math.inf if self.trainer.max_steps == -1 else self.trainer.max_steps
        if self.trainer.max_epochs in (None, -1):
            return most
        return min(most, self.train_dataloader().steps * max(self.trainer.max_epochs, 1))

    def val_dataloader(self) -> list[EvaluationLoader]:
        # A fit is allowed to have no validation data; `qpruner validate` is not.
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

    def calibration(
        self, num_sequences: int, length: int, rank: int = 0, world_size: int = 1, *, whose: str = "Calibration"
    ) -> Tensor:
        """This rank's share of the sequences on which scores and error compensation are computed.

        The sequences do not depend on the number of ranks: they are drawn without replacement from the training rows
        that are long enough, each is cut out at a random position, and they are dealt to the ranks in turn. If too few
        rows are long enough, as with short instructions, the training text is concatenated and cut anew.

        Args:
            num_sequences: number of sequences over all ranks, at least 1.
            length: number of tokens in each sequence, at least 2.
            rank: rank of this process, from 0.
            world_size: number of processes.
            whose: name of what needs the text, for the error message.

        Raises:
            UserError: there is less training text than that, or the sequences are longer than the model's table of
                positions.
        """  # [num_sequences / world_size, length] int64
        if num_sequences < 1 or length < 2:
            raise UserError(f"{whose} needs at least 1 sequence of 2 tokens, not {num_sequences} of {length}.")
        if self._learned_positions is not None and length > self._learned_positions:
            raise UserError(
                f"{whose} asks for sequences of {length} tokens, and the model has a table of "
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
                f"{whose} asks for {num_sequences} sequences of {length} tokens; the {len(rows)} training rows "
                f"have {len(rows.tokens):,} tokens, enough for {pieces}. Ask for fewer or shorter ones, or give more "
                f"text."
            )
        mine = starts[rank::world_size]
        return rows.tokens[mine[:, None] + torch.arange(length)].long()


def position(trainer: Trainer | None) -> tuple[int, int]:
    """The current epoch of a Trainer's fit, and how many of its batches have been read."""
    if trainer is None:
        return 0, 0
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
