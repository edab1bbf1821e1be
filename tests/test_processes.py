"""Work that the first of several processes does for all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support.ranks import together

from qpruner.compressed import CompressedModel
from qpruner.errors import UserError
from qpruner.evaluation.devices import launch
from qpruner.processes import Processes, accelerator_for, check_device


class Wire:
    """What the first process says is what the second hears."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def first(self) -> Processes:
        return replace(Processes.alone(), world_size=2, broadcast=self._say)

    def second(self) -> Processes:
        return replace(Processes.alone(), rank=1, world_size=2, broadcast=lambda _: self.said.pop(0))

    def _say(self, value: Any) -> Any:
        self.said.append(value)
        return value


def never() -> None:
    pytest.fail("the second process is spared the work")


def test_all_have_what_the_first_found() -> None:
    wire = Wire()
    assert wire.first().of_first(lambda: 3) == 3
    assert wire.second().of_first(never) == 3 and wire.said == []


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (UserError("No room."), "No room."),
        (OSError(28, "No space left"), "The first process failed: OSError: .*No space"),
    ],
)
def test_an_error_of_the_first_reaches_all(error: Exception, heard: str) -> None:
    def fail() -> None:
        raise error

    wire = Wire()
    with pytest.raises(type(error)) as raised:
        wire.first().of_first(fail)
    assert raised.value is error
    with pytest.raises(UserError, match=heard):
        wire.second().of_first(never)


def test_each_has_what_it_found_itself() -> None:
    assert together(*[lambda processes: processes.of_each(lambda: 10 + processes.rank)] * 3) == [10, 11, 12]
    assert Processes.alone().of_each(lambda: 3) == 3


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (UserError("Kein Plätzchen."), "Kein Plätzchen."),
        (OSError(28, "No space left"), "Process 1 failed: OSError: [Errno 28] No space left"),
        (UserError("é" * 900), "é" * 500),  # as much of it as there is room for
    ],
)
def test_an_error_of_any_reaches_all(error: Exception, heard: str) -> None:
    def work(processes: Processes) -> None:
        def fail() -> None:
            if processes.rank == 1:
                raise error

        processes.of_each(fail)
        pytest.fail("no process goes on")

    first, second, third = together(work, work, work)
    assert second is error
    assert isinstance(first, UserError) and isinstance(third, UserError) and str(first) == str(third) == heard
    with pytest.raises(type(error)) as raised:
        replace(Processes.alone(), rank=0).of_each(lambda: raising(error))
    assert raised.value is error


def raising(error: Exception) -> None:
    raise error


def test_hashes_of_a_compressed_base_are_left_to_one_who_has_compared_them(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CompressedModel.load(str(tiny_llama), dtype="float32")
    model.keep(tmp_path / "model", tokenizer=None)
    monkeypatch.setattr("qpruner.folder_manifest.hash_file", lambda _: pytest.fail("hashed again"))
    loaded = CompressedModel.load(
        str(tmp_path / "model"), dtype="float32", fingerprint=lambda _: "known", check_hashes=False
    )
    assert loaded.base_sha256 == "known"
    weights = zip(model.network.parameters(), loaded.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_devices_without_double_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(torch.device("cpu"))
    monkeypatch.setattr(Fabric, "device", torch.device("mps"))
    with pytest.raises(UserError, match="mps, which has no float64"):
        launch("cpu", 1)


@pytest.mark.parametrize("has_mps", [True, False])
def test_the_automatic_accelerator_is_one_with_double_precision(has_mps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert accelerator_for("auto") == ("cpu" if has_mps else "auto")
    assert accelerator_for("cuda") == "cuda"
