"""What a teacher says of rows: whole in each file, the same whoever writes it, and told when it is damaged."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import HIDDEN, VOCAB, tiny_model
from support.ranks import together

from qpruner.datamodules.loader import ResumableLoader
from qpruner.datamodules.rows import FILLER, Row, TextExamples, TokenRows
from qpruner.errors import UserError
from qpruner.likelihood import Head, Scored
from qpruner.processes import Processes
from qpruner.training import recording
from qpruner.training.distillation import forward_kl
from qpruner.training.recording import Form, Recording, rows_of_fit
from qpruner.training.teaching import record_missing

FORM = Form(top_k=VOCAB - 1, temperature=1.5, hidden_size=0, dtype="float32", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def examples() -> TextExamples:
    """Ten rows of uneven length and number of scored tokens; the fourth has none, the fifth nothing at all."""
    tokens = np.random.default_rng(2).integers(5, VOCAB, (10, 14)).astype(np.int32)
    nothing, places = np.zeros(14, np.int32), np.arange(14)
    rows = [Row(tokens[n], (places >= n % 3) & (n != 3), nothing)[: 0 if n == 4 else 5 + 3 * n % 10] for n in range(10)]
    return TextExamples(TokenRows.of(rows), pad_token=0)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, examples: TextExamples) -> None:
    """Three rows to a part."""
    monkeypatch.setattr(recording, "PART_BYTES", 3 * examples.rows.longest * FORM.bytes_per_token)


def recorded(folder: Path, examples: TextExamples, form: Form = FORM, ranks: int = 1) -> Recording:
    model = tiny_model("llama").requires_grad_(False)
    one = Recording(folder, examples, range(10), form, ["ab12"])
    missing = one.missing()
    one.check_room(missing)
    for rank in reversed(range(ranks)):
        one.record(model, missing[rank::ranks], device=torch.device("cpu"), forward_context=nullcontext)
    return one


def test_of_every_row_it_says_what_the_model_does(examples: TextExamples, tmp_path: Path) -> None:
    form = Form(top_k=VOCAB - 1, temperature=1.5, hidden_size=HIDDEN, dtype="float32", vocab_size=VOCAB)
    teacher, model = recorded(tmp_path, examples, form), tiny_model("llama").requires_grad_(False)
    batch = examples.collate([7, 3, 0, FILLER, 9, 4, 1])
    scored = Scored.of(model, batch["input_ids"], batch["labels"], batch["attention_mask"])
    lesson = teacher.lesson(batch)
    assert lesson.hidden is not None and len(scored.hidden) == examples.num_scored([7, 0, 9, 1])
    torch.testing.assert_close(lesson.hidden, scored.hidden, rtol=1e-4, atol=1e-5)  # beside other rows
    student = torch.randn(len(scored.hidden), VOCAB)
    part = slice(3, 9)
    expected = forward_kl(student[part], Head.of(model)(scored.hidden[part]), 1.5)
    torch.testing.assert_close(lesson.kl(student[part], part), expected, rtol=2e-3, atol=1e-4)
    nothing = teacher.lesson(examples.collate([3, FILLER]))
    assert nothing.hidden is not None and nothing.hidden.shape == (0, HIDDEN)


def test_ranks_share_the_parts_and_write_the_same_files(examples: TextExamples, tmp_path: Path) -> None:
    folders = [recorded(tmp_path / str(ranks), examples, ranks=ranks).folder for ranks in (1, 3)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 4


def test_the_size_that_is_told_is_that_of_the_files(examples: TextExamples, tmp_path: Path) -> None:
    told = Recording(tmp_path, examples, range(10), FORM, ["ab12"]).check_room([0, 1, 2, 3])
    size = sum(path.stat().st_size for path in recorded(tmp_path, examples).folder.iterdir())
    assert told == examples.rows.num_scored * (2 * VOCAB + 4 * (VOCAB - 1)) <= size < told + 4 * 400


def test_a_name_stands_for_content(examples: TextExamples, tmp_path: Path) -> None:
    def names(rows: range = range(10), form: Form = FORM, source: str = "ab12", tokens: int = 0) -> list[str]:
        given = examples.rows
        changed = TokenRows(given.tokens + tokens, given.scored, given.num_bytes, given.offsets)
        parts = Recording(tmp_path, TextExamples(changed, 0), rows, form, [source]).parts
        return [part.path.name for part in parts]

    usual = names()
    assert names(range(6)) == usual[:2] and names(range(5))[:1] == usual[:1] and names(range(5))[1] != usual[1]
    hot = Form(**{**vars(FORM), "temperature": 2.0})
    for other in (names(form=hot), names(source="beef"), names(tokens=1)):
        assert not set(other) & set(usual)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:8] + b"?" + data[9:],
        lambda data: data.replace(b'"F16"', b'"I16"'),
        lambda data: data[:-4] + b"\xff\xff\xff\x7f",
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(damage: Any, examples: TextExamples, tmp_path: Path) -> None:
    teacher = recorded(tmp_path, examples)
    path = teacher.parts[0].path
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path.name}.*Delete that file and run again"):
        teacher.lesson(examples.collate([2]))
    teacher.lesson(examples.collate([5]))
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}.*Delete that file and run again"):
        teacher.lesson(examples.collate([2]))


def test_a_folder_that_cannot_be_written_is_told(
    examples: TextExamples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write what .*Make room there, give another --run.dir"):
        recorded(tmp_path / "file" / "teacher", examples)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "save_file", full)
    with pytest.raises(UserError, match=r"Cannot write .*No space left.*have the teacher online"):
        recorded(tmp_path, examples)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("fails", ["load", "record"])
def test_an_error_of_one_process_reaches_those_that_record_beside_it(
    fails: str, examples: TextExamples, tmp_path: Path
) -> None:
    def work(processes: Processes) -> None:
        teacher = Recording(tmp_path, examples, range(10), FORM, ["ab12"])

        def load() -> Any:
            if fails == "load" and processes.rank == 1:
                raise UserError("No room for the teacher.")
            return tiny_model("llama").requires_grad_(False)

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        if fails == "record" and processes.rank == 1:
            teacher.record = full  # type: ignore[method-assign]
        record_missing(teacher, load, torch.device("cpu"), processes)

    first, second = together(work, work)
    assert isinstance(first, UserError) and isinstance(second, UserError if fails == "load" else OSError)
    assert ("No room for the teacher." if fails == "load" else "Process 1 failed: OSError") in str(first)


@pytest.mark.parametrize(("epochs", "steps"), [(2, -1), (-1, 3), (None, 5), (1, 1), (3, 4), (1, 0)])
def test_rows_of_a_fit_are_those_that_its_ranks_read(epochs: int | None, steps: int, examples: TextExamples) -> None:
    options: Any = {"batch_size": 2, "seed": 3, "world_size": 2, "accumulate": 2, "limit": 1.0}
    ranks = [ResumableLoader(examples, rank=rank, **options) for rank in range(2)]
    read: set[int] = set()
    for step in range(100 if steps == -1 else steps):
        epoch, within = divmod(step, ranks[0].steps)  # of two batches an epoch, one step
        if epochs in (None, -1) or epoch < epochs:
            for loader in ranks:
                for batch in loader.batches(epoch)[2 * within : 2 * within + 2]:
                    read |= set(batch)
    assert rows_of_fit(ranks[1], epochs, steps) == read
    assert rows_of_fit(ranks[0], -1, -1) == set(range(10))
