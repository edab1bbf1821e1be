"""Where gates begin, against slopes taken by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.families import VOCAB, tiny_model
from support.joint import CPU, between, examples_of, gated, text_of

from qpruner.errors import UserError
from qpruner.joint.prior import SHIFTS, Text, balanced, fisher_logits, loss_of
from qpruner.joint.projection import STRUCTURE, hard, thresholds_within
from qpruner.joint.space import acting
from qpruner.likelihood import IGNORED, token_nll
from qpruner.processes import Processes
from qpruner.quantization.formats import dequantize

ROWS = torch.randint(1, VOCAB, (27,), generator=torch.Generator().manual_seed(7)).split([9, 12, 6])
PROMPT = 3
"""Tokens of each row that are no targets."""
TEXT = text_of(ROWS, PROMPT)


def nll(network: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Summed loss of one row, without padding."""
    labels = torch.cat([torch.full((PROMPT,), IGNORED), tokens[PROMPT:]])
    return token_nll(network, tokens[None], labels[None]).sum()


def of_rank(rank: int, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> Processes:
    alone = Processes.alone()
    return Processes(CPU, rank, 2, alone.forward_context, reduce, alone.broadcast)


def test_rows_are_whole_and_dealt_to_ranks_with_the_targets_of_training() -> None:
    text = Text.share(examples_of(ROWS, PROMPT), [2, 0, 1], 1, of_rank(0))
    assert (text.num_rows, text.num_scored) == (3, 27 - 3 * PROMPT)
    assert [batch["input_ids"].tolist() for batch in text.batches] == [[ROWS[2].tolist()], [ROWS[1].tolist()]]
    assert text.batches[0]["labels"].tolist() == [[IGNORED] * PROMPT + ROWS[2][PROMPT:].tolist()]
    (batch,) = Text.share(examples_of(ROWS, PROMPT), [2, 0, 1], 1, of_rank(1)).batches
    assert batch["input_ids"].tolist() == [ROWS[0].tolist()]
    with pytest.raises(UserError, match="None of the 3 training rows.*joint.start_rows"):
        text_of(ROWS, prompt=12)


def test_a_width_is_worth_what_it_spares_by_the_byte() -> None:
    network, bank = gated()
    logits = fisher_logits(network, TEXT, Processes.alone())
    name = "model.layers.1.mlp.down_proj"
    plain = tiny_model("llama")
    dense = plain.get_submodule(name).weight
    differences = [dequantize(bank.linear(name, one)) - dense.detach() for one in network.space.offered]  # type: ignore[arg-type]
    rises = torch.zeros(3, dtype=torch.float64)
    for tokens in ROWS:
        (slope,) = torch.autograd.grad(nll(plain, tokens), dense)
        rises += torch.stack([(slope * difference).sum().double().square() for difference in differences]) / 6
    sizes = [sum(part.nbytes for part in bank.linear(name, one).packed().values()) for one in network.space.offered]  # type: ignore[union-attr]
    for step in range(2):
        rate = (rises[step] - rises[step + 1]) / (sizes[step + 1] - sizes[step])
        if rate > 1e-9:
            assert float(logits["upgrades"][1, 3, step]) == pytest.approx(float(torch.log(rate)), abs=1e-3)


def test_a_dead_unit_is_worth_least_and_ranks_share_the_text() -> None:
    network, _ = gated()
    with torch.no_grad():
        network.linears[0]["down"][0].dense.weight[:, 5] = 0
    logits = fisher_logits(network, TEXT, Processes.alone())
    assert int(logits["channels"][:48].argmin()) == 5
    assert set(logits) == set(network.space.shapes)

    sums: list[torch.Tensor] = []
    for rank in range(2):
        processes = of_rank(rank, lambda values: sums.append(values) or values)  # type: ignore[func-returns-value]
        fisher_logits(network, text_of(ROWS, PROMPT, processes), processes)
    half = len(sums) // 2
    whole: list[torch.Tensor] = []
    alone = Processes.alone()
    fisher_logits(
        network,
        TEXT,
        Processes(CPU, 0, 1, alone.forward_context, lambda values: whole.append(values) or values, alone.broadcast),
    )
    for first, second, both in zip(sums[:half], sums[half:], whole, strict=True):
        assert torch.allclose(first + second, both, rtol=1e-4)


def test_kinds_are_balanced_by_the_loss_of_what_the_budget_leaves() -> None:
    network, _ = gated()
    space, limit = network.space, between(network.space)
    start = fisher_logits(network, TEXT, Processes.alone())
    worthless = {kind: values + (12.0 if kind in STRUCTURE else 0.0) for kind, values in start.items()}
    losses = {}
    for name, logits in (("start", start), ("no pruning", worthless)):
        losses[name] = loss_of(network, logits, limit, TEXT, Processes.alone())
        mended = balanced(network, logits, limit, TEXT, Processes.alone())
        losses[f"{name}, balanced"] = loss_of(network, mended, limit, TEXT, Processes.alone())
        shifts = {float((mended[kind] - logits[kind]).mean().round(decimals=4)) for kind in STRUCTURE}
        assert len(shifts) == 1 and torch.equal(mended["upgrades"], logits["upgrades"])
        tried = [
            loss_of(network, {**logits, **{kind: logits[kind] + shift for kind in STRUCTURE}}, limit, TEXT,
                    Processes.alone())
            for shift in SHIFTS
        ]  # fmt: skip
        assert losses[f"{name}, balanced"] == pytest.approx(min(tried), rel=1e-6)
    assert losses["start, balanced"] <= losses["start"]
    network.open(hard(acting(start), thresholds_within(space, acting(start), limit)))
    assert losses["start"] == pytest.approx(
        sum(float(nll(network.network, tokens).detach()) for tokens in ROWS), rel=1e-5
    )
