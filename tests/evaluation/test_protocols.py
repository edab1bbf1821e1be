"""Whole texts by the protocols of papers, against plain loops of transformers and windows cut by hand."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import Precision

from qpruner.datamodules.rows import Row
from qpruner.errors import UserError
from qpruner.evaluation.protocols import Protocol, Windows, read_text, score_text, tokens_of
from qpruner.pretrained import load_tokenizer
from qpruner.processes import Processes
from qpruner.training.module import LoRAFinetuner

HOW: dict[str, Any] = {
    "name": "toy",
    "source": "a test",
    "pad_token": 0,
    "tokens_per_batch": 100,
    "device": torch.device("cpu"),
    "precision": Precision(),
}
TEXT = "Once there was a cat. It sat on a mat, and nobody knew why — not even the cat. " * 12


def counted(total: int) -> Row:
    """Tokens 0, 1, 2, ... of a byte each."""
    return Row(np.arange(total, dtype=np.int32), np.ones(total, np.bool_), np.ones(total, np.int32))


def cut(total: int, protocol: Protocol) -> tuple[list[list[int]], list[int], int]:
    """The windows, the tokens that a batch of all of them scores, and what is dropped."""
    windows = Windows.of(counted(total), protocol)
    offsets = windows.rows.offsets.tolist()
    rows = [windows.rows.tokens[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
    labels = windows.rows.pad(range(len(rows)), pad_token=0)["labels"]
    return rows, labels[labels >= 0].tolist(), windows.dropped


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (Protocol(2048), "2,048 tokens, disjoint"),
        (Protocol(128), "128 tokens, disjoint"),
        (Protocol(2048, 512), "2,048 tokens, stride 512"),
    ],
)
def test_a_protocol_has_a_name_that_numbers_are_compared_by(protocol: Protocol, name: str) -> None:
    assert protocol.name == name


@pytest.mark.parametrize(
    ("length", "stride", "problem"),
    [
        (1, None, "window of 1 tokens has nothing to predict"),
        (8, 0, r"stride 0 is not in 1\.\.8: .* not move on"),
        (8, 9, r"stride 9 is not in 1\.\.8: .* leave tokens out"),
    ],
)
def test_windows_that_score_nothing_or_leave_tokens_out_are_refused(
    length: int, stride: int | None, problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        Protocol(length, stride)


def test_disjoint_windows_drop_the_rest_and_their_first_tokens() -> None:
    assert cut(11, Protocol(4)) == ([[0, 1, 2, 3], [4, 5, 6, 7]], [1, 2, 3, 5, 6, 7], 3)
    assert cut(8, Protocol(4)) == ([[0, 1, 2, 3], [4, 5, 6, 7]], [1, 2, 3, 5, 6, 7], 0)


def test_windows_of_a_stride_score_each_token_but_the_first_once() -> None:
    rows, scored, dropped = cut(9, Protocol(4, 2))
    assert rows == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8]]
    assert (scored, dropped) == ([1, 2, 3, 4, 5, 6, 7, 8], 0)
    assert cut(11, Protocol(4, 4)) == ([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]], [1, 2, 3, 5, 6, 7, 9, 10], 0)
    for total in range(2, 30):
        for length in range(2, 9):
            for stride in range(1, length):
                rows, scored, _ = cut(total, Protocol(length, stride))
                assert scored == list(range(1, total)), (total, length, stride)
                assert rows[-1][-1] == total - 1 and all(len(row) == length for row in rows[:-1])


@pytest.mark.parametrize(("total", "protocol", "window"), [(7, Protocol(8), "8"), (1, Protocol(8, 4), "2")])
def test_a_text_that_fills_no_window_is_told(total: int, protocol: Protocol, window: str) -> None:
    with pytest.raises(UserError, match=rf"{total} token\(s\), which do not fill a window of {window}"):
        Windows.of(counted(total), protocol)


@pytest.fixture
def module(tiny_llama: Path) -> LoRAFinetuner:
    module = LoRAFinetuner(base=str(tiny_llama))
    module.load_base()
    module.model.train()
    return module


@pytest.mark.parametrize("protocol", [Protocol(40, 16), Protocol(40, 40), Protocol(40, 39), Protocol(24, 1)])
def test_strided_perplexity_is_that_of_the_usual_loop(
    module: LoRAFinetuner, tiny_llama: Path, protocol: Protocol
) -> None:
    """Labels of -100 for what was scored before, and the loss of transformers, window by window."""
    row = tokens_of(load_tokenizer(str(tiny_llama)), TEXT)
    score = score_text(module.model, Windows.of(row, protocol), **HOW)
    assert module.model.training  # left in the mode that it was in
    module.model.eval()
    assert protocol.stride is not None
    tokens = torch.from_numpy(row.tokens).long().unsqueeze(0)
    total, previous, nll, count = tokens.shape[1], 0, 0.0, 0
    for begin in range(0, total, protocol.stride):
        end = min(begin + protocol.length, total)
        window = tokens[:, begin:end]
        labels = window.clone()
        labels[:, : previous - end] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nll += float(module.model(window, labels=labels).loss) * scored
        count, previous = count + scored, end
        if end == total:
            break
    assert score.tokens == count and total > 4 * protocol.length
    assert score.perplexity == pytest.approx(np.exp(nll / count), rel=1e-6)
    assert (score.name, score.protocol, score.dropped) == ("toy", protocol.name, 0)


def test_disjoint_perplexity_is_that_of_the_usual_reshape(module: LoRAFinetuner, tiny_llama: Path) -> None:
    """The tokens as a matrix, and the mean of all its losses."""
    row = tokens_of(load_tokenizer(str(tiny_llama)), TEXT)
    score = score_text(module.model, Windows.of(row, Protocol(32)), **HOW)
    module.model.eval()
    tokens = torch.from_numpy(row.tokens).long()
    matrix = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = module.model(matrix, labels=matrix).loss
    assert score.perplexity == pytest.approx(float(loss.exp()), rel=1e-6)
    assert score.tokens == len(matrix) * 31 and score.dropped == len(tokens) % 32 > 0
    num_bytes = row.num_bytes[: matrix.numel()].reshape(-1, 32)[:, 1:].sum()
    assert score.bits_per_byte == pytest.approx(float(loss) / np.log(2) * score.tokens / num_bytes, rel=1e-6)


def test_a_process_scores_its_share_of_the_windows(module: LoRAFinetuner, tiny_llama: Path) -> None:
    windows = Windows.of(tokens_of(load_tokenizer(str(tiny_llama)), TEXT), Protocol(32, 8))
    alone = Processes.alone()
    shares = [
        score_text(module.model, windows, processes=Processes(**{**vars(alone), "rank": rank, "world_size": 2}), **HOW)
        for rank in range(2)
    ]
    assert min(share.tokens for share in shares) > 0
    assert sum(share.tokens for share in shares) == windows.rows.num_scored


def test_windows_longer_than_the_model_are_refused(module: LoRAFinetuner) -> None:
    with pytest.raises(UserError, match=r"Windows of 300 tokens .* 256 positions .* at most 256"):
        score_text(module.model, Windows.of(counted(700), Protocol(300)), **HOW)


def test_tokens_of_another_model_are_refused(module: LoRAFinetuner) -> None:
    row = counted(40)
    row.tokens[7] = 2048
    with pytest.raises(UserError, match=r"the token 2048, .* has 2,048 rows"):
        score_text(module.model, Windows.of(row, Protocol(20)), **HOW)


def test_what_the_tokenizer_adds_stands_once_at_the_start_of_the_text(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_llama))
    whole = tokens_of(tokenizer, TEXT * 200)  # long enough to be tokenized in pieces
    assert whole.tokens.tolist() == tokenizer(TEXT * 200)["input_ids"]
    assert int(whole.num_bytes.sum()) == len((TEXT * 200).encode())


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\n\nTwo. \n")
    text = read_text(str(tmp_path / "a.txt"))
    assert text.text == "One.\n\n\nTwo. \n"
    digest = "e37e995323c85bf923d6f13fc1ff41cf4d39f75c3a69569c844b93eea0cf1dc8"
    assert text.source == f"{tmp_path / 'a.txt'}, SHA-256 of the text {digest}"


@pytest.mark.parametrize(("separator", "expected"), [("\n\n", "One.\n\n\n\nTwo."), (" ", "One.  Two.")])
def test_records_are_joined_the_empty_ones_included(tmp_path: Path, separator: str, expected: str) -> None:
    lines = [json.dumps({name: value}) for name, value in [("text", "One."), ("text", ""), ("sentence", "Two.")]]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    text = read_text(str(tmp_path / "a.jsonl.gz"), separator)
    assert text.text == expected
    assert f", 3 records joined by {separator!r}, SHA-256" in text.source


def test_the_test_split_of_a_folder_is_read_unless_another_is_named(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {n}"}) + "\n" for n in range(3)))
    assert read_text(str(tmp_path)).text == "test 0\n\ntest 1\n\ntest 2"
    assert read_text(f"{tmp_path}@validation[:2]").text == "validation 0\n\nvalidation 1"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"content": "Two."}', "a.jsonl line 2 has no text in a field 'text' or 'sentence', but 'content'"),
        ('{"text": 2}', "a.jsonl line 2 has no text in a field"),
        ("{", r"has records that cannot be read: 1 not JSON \(first: a.jsonl line 2\)"),
        ('{"text": "\\ud800"}', "a.jsonl line 2 is a record with half a surrogate pair"),
    ],
)
def test_a_text_with_holes_is_refused(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "One."}\n' + line + "\n")
    with pytest.raises(UserError, match=problem):
        read_text(str(tmp_path / "a.jsonl"))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file or folder"):
        read_text(str(tmp_path / "a.txt"))
