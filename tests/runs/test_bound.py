from datetime import timedelta
from pathlib import Path

import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from qpruner.callbacks import StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.runs.bound import plain
from qpruner.search.config import SearchConfig
from qpruner.training.optimization import OptimizerConfig


def test_values_are_what_yaml_gives_back() -> None:
    value = {"a": (1, 2.5, None, True), "b": Path("x/y"), "c": OptimizerConfig(lr=0.5), "d": SearchConfig(trials=3)}
    made = plain(value)
    assert made["a"] == [1, 2.5, None, True] and made["b"] == "x/y" and made["c"]["lr"] == 0.5
    assert made["d"]["trials"] == 3 and made["d"]["executor"]["workers"] == SearchConfig().executor.workers
    assert yaml.safe_load(yaml.safe_dump(made)) == made


def test_an_object_is_its_class_and_what_it_was_made_with(tmp_path: Path) -> None:
    stopping = plain(EarlyStopping(monitor="val/loss", patience=7, mode="max"))
    assert stopping["class_path"] == "lightning.pytorch.callbacks.early_stopping.EarlyStopping"
    assert {name: stopping["init_args"][name] for name in ("monitor", "patience", "mode")} == {
        "monitor": "val/loss", "patience": 7, "mode": "max"
    }  # fmt: skip
    pruning = plain(StructuredPruning(0.25, rounds=2))
    assert (pruning["init_args"]["ratio"], pruning["init_args"]["rounds"]) == (0.25, 2)
    assert plain(CSVLogger(tmp_path, name="x")) == {"class_path": "lightning.pytorch.loggers.csv_logs.CSVLogger"}
    assert plain(EarlyStopping) == "lightning.pytorch.callbacks.early_stopping.EarlyStopping"
    assert plain(timedelta(minutes=2))["init_args"] == {"seconds": 120, "days": 0, "microseconds": 0}


def test_a_data_module_tells_what_its_rows_come_from(tiny_llama: Path) -> None:
    def told(**options: int) -> dict:
        return plain(StoriesDataModule(tokenizer=str(tiny_llama), loader=LoaderConfig(batch_size=3), **options))

    one = told(num_train=9, seed=4)
    assert one["class_path"] == "qpruner.datamodules.stories.StoriesDataModule"
    options = one["init_args"]
    assert (options["loader"]["batch_size"], options["seed"], options["rows"]["stories"]["train"]) == (3, 4, 9)
    assert options["rows"]["sample"].keys() == {"sha256"}  # twenty stories are more than a person would read
    assert told(num_train=9, seed=4) == one != told(num_train=9, seed=4, story_seed=1)
