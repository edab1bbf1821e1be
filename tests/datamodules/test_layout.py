"""Folders as the hub, the datasets library and people lay them out."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import pytest

from qpruner.datamodules.layout import Layout, read_layout
from qpruner.errors import UserError


def lay_out(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')
    return folder


def layout(folder: Path, config: str | None = None) -> Layout:
    read = read_layout(folder, config)
    assert read is not None
    return read


def names(layout: Layout, base: Path | None = None) -> dict[str, list[str]]:
    """The splits, with their files by their names in a folder."""

    def relative(files: Iterable[Path]) -> list[str]:
        return [file.relative_to(base or layout.folder).as_posix() for file in files]

    splits = {split: relative(files) for split, files in layout.splits.items()}
    return splits | ({"": relative(layout.unnamed)} if layout.unnamed else {})


def write_readme(folder: Path, front_matter: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\n{front_matter}\n---\n# Data\n")


# Names.


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "test": ["data/test-00000-of-00001.parquet"],
            },
        ),
        (
            ["train/0000.parquet", "validation/0000.parquet", "test/part/0000.parquet"],
            {
                "train": ["train/0000.parquet"],
                "validation": ["validation/0000.parquet"],
                "test": ["test/part/0000.parquet"],
            },
        ),
        (["data/train/a.jsonl", "data/dev/a.jsonl"], {"train": ["data/train/a.jsonl"], "dev": ["data/dev/a.jsonl"]}),
        (["plain_text/train-00000-of-00001.parquet"], {"train": ["plain_text/train-00000-of-00001.parquet"]}),
        (["train.jsonl", "valid.jsonl"], {"train": ["train.jsonl"], "valid": ["valid.jsonl"]}),
        (["wiki.train.txt", "wiki_val.txt"], {"train": ["wiki.train.txt"], "val": ["wiki_val.txt"]}),
        (["TRAIN.JSONL", "testSet.jsonl"], {"train": ["TRAIN.JSONL"], "test": ["testSet.jsonl"]}),
        (["c4-train.00000-of-00512.json.gz"], {"train": ["c4-train.00000-of-00512.json.gz"]}),
        (["train1.csv", "train2.csv", "eval.csv"], {"train": ["train1.csv", "train2.csv"], "eval": ["eval.csv"]}),
        (
            ["data/train_sft-00000-of-00001-ab.parquet", "data/train_gen-00000-of-00001-cd.parquet"],
            {
                "train_gen": ["data/train_gen-00000-of-00001-cd.parquet"],
                "train_sft": ["data/train_sft-00000-of-00001-ab.parquet"],
            },
        ),
        # Further in goes before further out, and what is kept from training before training.
        (["train/a.jsonl", "train/test_a.jsonl"], {"train": ["train/a.jsonl"], "test": ["train/test_a.jsonl"]}),
        (["train_test_mix.jsonl", "train.jsonl"], {"train": ["train.jsonl"], "test": ["train_test_mix.jsonl"]}),
        # Words in which a split's name is hidden say nothing.
        (["contest.jsonl", "trainer.jsonl", "value.txt"], {"": ["contest.jsonl", "trainer.jsonl", "value.txt"]}),
        (["train.jsonl", "labels.txt"], {"train": ["train.jsonl"], "": ["labels.txt"]}),
    ],
)
def test_names_say_splits(tmp_path: Path, files: list[str], expected: dict[str, list[str]]) -> None:
    read = names(layout(lay_out(tmp_path, *files)))
    assert read == expected
    assert [split for split in read if split] == [split for split in expected if split]  # in their order


def test_what_is_no_data_is_left_out(tmp_path: Path) -> None:
    lay_out(
        tmp_path, "a.jsonl", ".a.jsonl", "._a.jsonl", ".cache/huggingface/download/a.json", "__MACOSX/a.jsonl",
        "README.md", "readme.txt", "LICENSE.txt", "requirements.txt", "sha256sums.txt", "dataset_infos.json",
        "dataset_info.json", "state.json/x.md", "script.py", "a.zip",
    )  # fmt: skip
    (tmp_path / "folder.txt").mkdir()
    assert names(layout(tmp_path)) == {"": ["a.jsonl"]}


def test_a_folder_in_a_hidden_place_is_read(tmp_path: Path) -> None:
    assert names(layout(lay_out(tmp_path / ".cache" / "x", "train.jsonl"))) == {"train": ["train.jsonl"]}


def test_a_folder_without_data(tmp_path: Path) -> None:
    lay_out(tmp_path, "LICENSE.txt", "data.zip")
    with pytest.raises(UserError, match=r"holds no .txt, .jsonl, .*parquet.* file .*Unpack archives"):
        read_layout(tmp_path)


def test_of_several_data_sets_one_must_be_named(tmp_path: Path) -> None:
    small, large = "wikitext-2-raw-v1/train-00000-of-00001.parquet", "wikitext-103-v1/train-00000-of-00001.parquet"
    lay_out(tmp_path, small, large)
    message = (
        f"holds several data sets: wikitext-103-v1, wikitext-2-raw-v1. Name one of them, as in '{tmp_path}:wikitext"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        read_layout(tmp_path)
    assert names(layout(tmp_path, "wikitext-2-raw-v1"), tmp_path) == {"train": [small]}
    with pytest.raises(UserError, match="has no data set 'wikitext-2', neither as a folder in it nor in its README"):
        read_layout(tmp_path, "wikitext-2")
    # Folders that do not compete are one data set.
    lay_out(tmp_path / "parts", "a/train.jsonl", "b/test.jsonl")
    assert names(layout(tmp_path / "parts")) == {"train": ["a/train.jsonl"], "test": ["b/test.jsonl"]}


# Which split is meant.


def test_which_split_is_meant() -> None:
    def splits(*names: str, unnamed: bool = False) -> Layout:
        return Layout(Path(), {name: [] for name in names}, [Path("x.txt")] if unnamed else [])

    assert splits("train", "dev", "eval").split("validation") == "dev"
    assert splits("train", "dev", "eval").split("test") == "eval"
    assert splits("eval", "test").split("test") == "test" and splits("eval", "test").split("eval") == "eval"
    assert splits("val", "valid").split("validation") is None  # which?
    assert splits("test").split("train") is None and splits("train_sft").split("train") is None
    assert splits("train_sft").split("train_sft") == "train_sft"
    assert splits("train", unnamed=True).split("train") == "train"
    assert splits("test", unnamed=True).split("train") == ""  # beside a test split, the rest is for training
    assert splits("test", unnamed=True).split("validation") is None


def test_what_is_read_is_described(tmp_path: Path) -> None:
    lay_out(tmp_path, "train.jsonl", "test.jsonl", "notes.txt")
    assert layout(tmp_path).describe("train") == (
        "read 1 file(s) of the split 'train' in its folder (train.jsonl); the folder also has 'test'; "
        "left alone notes.txt, named for no split"
    )
    (tmp_path / "train.jsonl").unlink()
    assert layout(tmp_path).describe("") == (
        "read 1 file(s) named for no split in its folder (notes.txt); the folder also has 'test'"
    )


# Folders that the datasets library wrote.


def data_set(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


def test_saved_data_sets(tmp_path: Path) -> None:
    datasets.DatasetDict(train_sft=data_set("a"), test=data_set("b")).save_to_disk(tmp_path / "both")
    arrow = "data-00000-of-00001.arrow"
    assert names(layout(tmp_path / "both")) == {"train_sft": [f"train_sft/{arrow}"], "test": [f"test/{arrow}"]}
    data_set("a", "b").save_to_disk(tmp_path / "single")
    lay_out(tmp_path / "single", "cache-0123456789abcdef.arrow")  # of a filter, as the library leaves it
    assert names(layout(tmp_path / "single")) == {"": [arrow]}
    for split in ("train", "valid"):
        data_set(split).save_to_disk(tmp_path / "parts" / split)
    assert names(layout(tmp_path / "parts")) == {"train": [f"train/{arrow}"], "valid": [f"valid/{arrow}"]}
    (tmp_path / "single" / arrow).unlink()
    with pytest.raises(UserError, match=f"{arrow}' is missing, which .*state.json' names"):
        read_layout(tmp_path / "single")
    (tmp_path / "single" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="state.json' is not what save_to_disk .* writes .*_data_files.* Save the data"):
        read_layout(tmp_path / "single")
    (tmp_path / "both" / "dataset_dict.json").write_text("[")
    with pytest.raises(UserError, match="dataset_dict.json' is not what save_to_disk"):
        read_layout(tmp_path / "both")


# What a README says.

CONFIGS = """configs:
- config_name: a
  data_files:
  - {split: train, path: [x/1.jsonl, "x/2*"]}
  - {split: test, path: "x/rest/**"}
- config_name: b
  data_files: y/*.jsonl
- config_name: c
  data_dir: z"""


@pytest.fixture
def described(tmp_path: Path) -> Path:
    lay_out(tmp_path, "x/1.jsonl", "x/2.jsonl", "x/2.md", "x/rest/deep/3.jsonl", "y/test.jsonl", "z/train.jsonl")
    lay_out(tmp_path, "z/test.jsonl", "train.jsonl")
    write_readme(tmp_path, CONFIGS)
    return tmp_path


def test_a_readme_goes_before_names(described: Path) -> None:
    assert names(layout(described, "a")) == {"train": ["x/1.jsonl", "x/2.jsonl"], "test": ["x/rest/deep/3.jsonl"]}
    assert names(layout(described, "b")) == {"train": ["y/test.jsonl"]}
    assert names(layout(described, "c"), described) == {"train": ["z/train.jsonl"], "test": ["z/test.jsonl"]}
    with pytest.raises(UserError, match=r"holds several data sets: a, b, c. Name one"):
        read_layout(described)
    with pytest.raises(UserError, match=r"no data set 'd', .*README.md, which names a, b, c"):
        read_layout(described, "d")
    write_readme(described, CONFIGS + "\n  default: true")
    assert names(layout(described), described)["train"] == ["z/train.jsonl"]
    write_readme(described, CONFIGS.replace("config_name: b", "config_name: default"))
    assert names(layout(described)) == {"train": ["y/test.jsonl"]}
    write_readme(described, "task_categories: [text-generation]")
    with pytest.raises(UserError, match="several data sets"):  # by their names: . and z
        read_layout(described)


def test_the_splits_are_those_of_the_datasets_library(
    described: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = str(tmp_path_factory.mktemp("cache"))
    for config in ("a", "b", "c"):
        reference = datasets.load_dataset_builder(str(described), config, cache_dir=cache).config.data_files
        files = {
            str(split): [Path(file) for file in listed if ".md" not in file] for split, listed in reference.items()
        }
        assert layout(described, config).splits == files


def test_a_data_set_that_was_downloaded_in_part(described: Path) -> None:
    (described / "x" / "rest" / "deep" / "3.jsonl").unlink()
    assert names(layout(described, "a")) == {"train": ["x/1.jsonl", "x/2.jsonl"]}
    (described / "y" / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"none of the files that its README.md names: .*y/\*.jsonl.*Download"):
        read_layout(described, "b")


@pytest.mark.parametrize("pattern", ["../*.jsonl", "https://example.com/a.jsonl", ".hidden/*", "{train: 7}"])
def test_patterns_that_leave_the_folder_match_nothing(tmp_path: Path, pattern: str) -> None:
    folder = lay_out(tmp_path / "folder", "a.jsonl", ".hidden/a.jsonl")
    lay_out(tmp_path, "outside.jsonl")
    write_readme(folder, f"configs:\n- data_files: {pattern}")
    with pytest.raises(UserError, match="has none of the files that its README.md names"):
        read_layout(folder)


@pytest.mark.parametrize("data_files", ["/etc/*", "7", "[{split: train}]"])
def test_patterns_that_make_no_sense(tmp_path: Path, data_files: str) -> None:
    write_readme(lay_out(tmp_path, "a.jsonl"), f"configs:\n- data_files: {data_files}")
    with pytest.raises(UserError, match="README.md' says of data_files cannot be used"):
        read_layout(tmp_path)


@pytest.mark.parametrize(
    "text", ["# Data\n\n---\ntwo: [\n---\n", "---\nconfigs: 7\n---\n", "---\na: [\n---\n", "---\n- 1\n---\n"]
)
def test_a_readme_that_says_nothing_of_data_is_no_matter(tmp_path: Path, text: str) -> None:
    (lay_out(tmp_path, "train.jsonl") / "README.md").write_text(text)
    assert names(layout(tmp_path)) == {"train": ["train.jsonl"]}


def test_what_only_the_library_does_is_left_to_it(tmp_path: Path) -> None:
    write_readme(lay_out(tmp_path, "a.csv"), 'configs:\n- data_files: a.csv\n  sep: "#"')
    assert read_layout(tmp_path) is None


def test_the_dataset_infos_of_old_pushes_are_no_data(tmp_path: Path) -> None:
    data_set("a").to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"splits": {"train": {"num_examples": 1}}}}))
    assert names(layout(tmp_path)) == {"train": ["data/train-00000-of-00001.parquet"]}
