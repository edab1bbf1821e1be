"""What all data modules share, on the stories."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import LlamaConfig

from qpruner.datamodules import StoriesDataModule, TextDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.errors import UserError
from qpruner.pretrained import EMBEDDED


def make(**options: Any) -> StoriesDataModule:
    sizes = {"num_train": 30, "num_validation": 5, "num_test": 5, "num_choices": 4}
    return StoriesDataModule(tokenizer=EMBEDDED, **{**sizes, **options})


@pytest.fixture(scope="module")
def data() -> StoriesDataModule:
    return make(max_length=60)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_calibration_is_the_same_whatever_the_number_of_ranks(data: StoriesDataModule, num_ranks: int) -> None:
    alone = data.calibration(10, 20)
    assert alone.shape == (10, 20) and alone.dtype == torch.int64
    shares = [data.calibration(10, 20, rank, num_ranks) for rank in range(num_ranks)]
    assert sum(map(len, shares)) == 10
    for rank, share in enumerate(shares):
        assert torch.equal(share, alone[rank::num_ranks])


def test_calibration_sequences_are_parts_of_different_training_rows(data: StoriesDataModule) -> None:
    rows = data.examples("train").rows
    texts = [rows.tokens[rows.offsets[i] : rows.offsets[i + 1]].tolist() for i in range(len(rows))]
    found = []
    starts = set()
    for sequence in data.calibration(30, 20).tolist():
        (row,) = [i for i, text in enumerate(texts) if any(text[s : s + 20] == sequence for s in range(len(text) - 19))]
        found.append(row)
        starts.add(next(s for s in range(41) if texts[row][s : s + 20] == sequence))
    assert sorted(found) == list(range(30))
    assert len(starts) > 10  # cut at places of their own
    assert not torch.equal(make(max_length=60, seed=1).calibration(30, 20), data.calibration(30, 20))
    assert sorted(data.calibration(30, 60).tolist()) == sorted(texts)  # whole rows, where there is no more


@pytest.mark.parametrize(("count", "length"), [(31, 20), (90, 20), (29, 61), (1, 1800)])
def test_where_too_few_rows_are_long_enough_the_text_is_run_together(
    data: StoriesDataModule, count: int, length: int
) -> None:
    """Each sequence is another piece of it."""
    tokens = data.examples("train").rows.tokens.tolist()
    pieces = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    drawn = data.calibration(count, length)
    places = [pieces.index(sequence) for sequence in drawn.tolist()]
    assert len(set(places)) == count and (count == 1 or places != sorted(places))
    assert torch.equal(
        torch.cat([data.calibration(count, length, rank, 2) for rank in (0, 1)]), torch.cat([drawn[::2], drawn[1::2]])
    )
    assert count == 1 or not torch.equal(make(max_length=60, seed=1).calibration(count, length), drawn)


def test_calibration_that_cannot_be_had(data: StoriesDataModule) -> None:
    said = "asks for 91 sequences of 20 tokens; the 30 training rows have 1,800 tokens, enough for 90. Ask for fewer"
    with pytest.raises(UserError, match=said):
        data.calibration(91, 20)
    with pytest.raises(UserError, match="asks for 1 sequences of 1801 tokens; .* enough for 0"):
        data.calibration(1, 1801)
    with pytest.raises(UserError, match="at least 1 sequence of 2 tokens, not 0 of 20"):
        data.calibration(0, 20)


def test_loaders_by_split(data: StoriesDataModule) -> None:
    train = data.train_dataloader()
    assert (train.batch_size, len(train)) == (8, 3)
    text, choices = data.test_dataloader()
    assert (text.tokens, len(text)) == (4096, 1)
    assert torch.equal(next(iter(text))["example"], torch.arange(5))
    assert next(iter(choices))["example"].tolist() == [0, 1, 2, 3]
    assert len(make(num_choices=0).val_dataloader()) == 1


def test_fingerprint_is_of_the_tokens(data: StoriesDataModule) -> None:
    fingerprint = data.fingerprint()
    rows = {split: fingerprint[split]["rows"] for split in ("train", "validation", "test")}
    assert rows == {"train": 30, "validation": 5, "test": 5}
    assert fingerprint["test tasks"]["endings"]["questions"] == 4
    assert fingerprint["test tasks"]["endings"]["sha256"] != fingerprint["validation tasks"]["endings"]["sha256"]
    assert fingerprint["test"]["tokens"] == 5 * 60
    assert make(max_length=60).fingerprint() == fingerprint
    assert make(max_length=60, story_seed=1).fingerprint()["test"]["sha256"] != fingerprint["test"]["sha256"]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("eval_tokens_per_batch", 0), ("num_workers", -1)])
def test_impossible_batches(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"loader.{name} is {value}; it must be at least {value + 1}"):
        LoaderConfig(**{name: value})


def test_ranks_of_a_trainer_share_the_rows(data: StoriesDataModule) -> None:
    ranks = [make(max_length=60, loader=LoaderConfig(batch_size=4)) for _ in range(2)]
    for number, rank in enumerate(ranks):
        rank.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=number, world_size=2, limit_train_batches=0.7, accumulate_grad_batches=2, callbacks=[],
            state=SimpleNamespace(fn="fit"), current_epoch=1,
            fit_loop=SimpleNamespace(
                epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=1)))
            ),
        )  # fmt: skip
    train = [rank.train_dataloader() for rank in ranks]
    assert {len(loader) for loader in train} == {3}
    assert {(loader.limit, loader.accumulate) for loader in train} == {(0.7, 2)}
    seen = [index for loader in train for batch in loader for index in batch["example"].tolist()]
    assert len(set(seen)) == len(seen) == 16  # two of three batches of either rank: one was read
    assert seen[:4] == train[0].batches(1)[1]
    text = [next(iter(rank.val_dataloader()[0]))["example"].tolist() for rank in ranks]
    assert text == [[0, 1, 2, 3, 4], [-1]]


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_epochs": 3, "accumulate_grad_batches": 2, "limit_train_batches": 0.5},
        {"max_epochs": 2, "limit_train_batches": 2},
        {"max_epochs": 3, "max_steps": 4},
        {"max_steps": 100},
        {"max_epochs": -1},
        {"fast_dev_run": 2},
        {},
    ],
)
def test_steps_of_a_fit_are_told_as_lightning_tells_them(options: dict[str, Any]) -> None:
    """Seven batches of 4 rows an epoch; Lightning must make its loaders to say so."""

    class Asking(LightningModule):
        def configure_optimizers(self) -> None:
            before = data.num_steps()
            assert trainer.fit_loop._combined_loader is None
            steps.extend((before, trainer.estimated_stepping_batches))
            raise KeyboardInterrupt

        def training_step(self, batch: Any) -> None: ...

    steps: list[float] = []
    data = make(max_length=60, loader=LoaderConfig(batch_size=4))
    trainer = Trainer(
        **options, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.fit(Asking(), datamodule=data)
    assert steps[0] == steps[1] > 0


def test_a_fit_may_go_without_validation_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One day Tom went home. " * 20)
    module = TextDataModule(train=str(tmp_path / "a.txt"), held_out=0.0, tokenizer=EMBEDDED, max_length=16)
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    assert module.val_dataloader() == []
    module.trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"))  # type: ignore[assignment]
    with pytest.raises(UserError, match="There is no validation data: give --data.init_args.validation"):
        module.val_dataloader()


def test_padding_without_a_padding_token() -> None:
    module = make()
    assert module.pad_token == module.tokenizer.convert_tokens_to_ids("<pad>")
    module.tokenizer.pad_token = None
    assert module.pad_token == module.tokenizer.eos_token_id == 1
    module.tokenizer.eos_token = None
    assert module.pad_token == 0


def test_a_row_needs_two_tokens() -> None:
    with pytest.raises(UserError, match="max_length is 1; a row needs at least 2 tokens"):
        make(max_length=1)


def test_the_vocabulary_of_the_model_is_held_against_the_tokens_of_the_data(data: StoriesDataModule) -> None:
    known = 1 + max(int(data.examples(split).rows.tokens.max()) for split in ("train", "validation", "test"))
    known = max(known, 1 + max(int(data.choices(split)[0].rows.tokens.max()) for split in ("validation", "test")))
    module = make(max_length=60)
    module.tokenizer.add_tokens(["unheard-of"])
    for enough in (4096, known):  # a token that no text has does no harm
        module.check_model(LlamaConfig(vocab_size=enough))
    token = module.tokenizer.convert_ids_to_tokens(known - 1)
    message = rf"the token {known - 1} \('{re.escape(token)}'\); .* has 2,049 tokens, and the .* has {known - 1:,} rows"
    with pytest.raises(UserError, match=message):
        module.check_model(LlamaConfig(vocab_size=known - 1))


def test_padding_that_the_model_does_not_know_becomes_a_token_that_it_does() -> None:
    module = make()
    module.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert module.pad_token == 2048
    module.check_model(LlamaConfig(vocab_size=2048))
    assert module.pad_token == module.tokenizer.eos_token_id == 1
    module.check_model(LlamaConfig(vocab_size=2049))
    assert module.pad_token == 2048
