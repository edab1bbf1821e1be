"""Which files of a local folder hold which split.

The names that denote a split are those that the Hugging Face hub understands, so that a downloaded data set has the
same splits as there. What the front matter of a README.md says about its data sets takes precedence over names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from qpruner.datamodules.documents import READABLE, kind
from qpruner.errors import UserError, nearest
from qpruner.files import read_json

SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")
ABOUT_DATA = re.compile(  # not data themselves
    r"(dataset_infos?|dataset_dict|state|config|croissant)\.json"
    r"|(read[-_]?me|licen[cs]e|copying|notice|citation|change[-_]?log|requirements|checksums?|(md5|sha\d+)(sums?)?)\.txt",
    re.IGNORECASE,
)
README_KEYS = {"config_name", "default", "data_files", "data_dir", "description", "features", "version"}


@dataclass(frozen=True)
class Layout:
    """The files of one data set.

    Args:
        folder: folder that holds the files.
        splits: files of each split, by the name that the folder gives it.
        unnamed: files that are named after no split.
    """

    folder: Path
    splits: dict[str, list[Path]] = field(default_factory=dict)
    unnamed: list[Path] = field(default_factory=list)

    def split(self, name: str) -> str | None:
        """The folder's name for a split, if it has it; the empty name stands for files named after no split.

        Files that are named after no split belong to training.
        """
        for group in SYNONYMS.values():
            if name in group and name not in self.splits:
                alike = [split for split in self.splits if split in group]
                if len(alike) == 1:
                    return alike[0]
                return "" if name in SYNONYMS["train"] and self.unnamed and not alike else None
        return name if name in self.splits else None

    def files(self, split: str) -> list[Path]:
        return self.splits[split] if split else self.unnamed

    def describe(self, split: str) -> str:
        """Describes what is read of the folder, which other splits it has, and which files belong to no split."""
        files = self.files(split)
        named = f"of the split {split!r}" if split else "named for no split"
        others = ", ".join(repr(name) for name in self.splits if name != split)
        says = f"read {len(files)} file(s) {named} in its folder ({self._names(files)})"
        says += f"; the folder also has {others}" if others else ""
        return says + (
            f"; left alone {self._names(self.unnamed)}, named for no split" if split and self.unnamed else ""
        )

    def _names(self, files: list[Path]) -> str:
        names = [file.relative_to(self.folder).as_posix() for file in files[:3]]
        return ", ".join(names) + (", ..." if len(files) > 3 else "")


def read_layout(folder: Path, config: str | None = None) -> Layout | None:
    """The data set of a folder; None if its README asks for something that only the ``datasets`` library can do.

    Args:
        folder: folder as downloaded from the hub or written by ``save_to_disk``, or any other with data files in it.
        config: name of the data set, in the README or as that of its subfolder; None for the only one.

    Raises:
        UserError: there are no data, there is no such data set, or there are several and none is named.
    """
    described = _described(folder)
    if config is not None and config not in described:
        if not (folder / config).is_dir():
            raise UserError(
                f"The folder {str(folder)!r} has no data set {config!r}, neither as a folder in it nor in its "
                f"README.md, which names {', '.join(described) or 'none'}.{nearest(config, described)}"
            )
        return read_layout(folder / config)
    if described:
        return _layout_of_readme(folder, described[_default(folder, described) if config is None else config])
    return _layout_of_names(folder)


def _described(folder: Path) -> dict[str, dict[str, Any]]:
    """What the README says about the data sets of a folder, by their names."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        front_matter = metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None
    except (ValueError, yaml.YAMLError):  # a text with horizontal rules in it, but no front matter
        front_matter = None
    configs = (front_matter or {}).get("configs")
    if not isinstance(configs, list):
        return {}
    return {str(c.get("config_name", "default")): c for c in configs if isinstance(c, dict)}


def _default(folder: Path, described: dict[str, dict[str, Any]]) -> str:
    defaults = [name for name, config in described.items() if config.get("default") is True or name == "default"]
    if len(described) > 1 and not defaults:
        raise _several(folder, list(described))
    return (defaults or list(described))[0]


def _several(folder: Path, names: list[str]) -> UserError:
    return UserError(
        f"The folder {str(folder)!r} holds several data sets: {', '.join(names)}. Name one of them, as in "
        f"'{folder}:{names[-1]}', or give a file."
    )


def _layout_of_readme(folder: Path, config: dict[str, Any]) -> Layout | None:
    from datasets.data_files import sanitize_patterns

    if config.keys() - README_KEYS:
        return None
    root = folder / str(config.get("data_dir", ""))
    if "data_files" not in config:
        return _layout_of_names(root)
    try:
        patterns = sanitize_patterns(config["data_files"])
        splits = {str(split): _matches(root, listed) for split, listed in patterns.items()}
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"What {str(folder / 'README.md')!r} says of data_files cannot be used: {error}.") from error
    if not any(splits.values()):
        raise UserError(
            f"The folder {str(folder)!r} has none of the files that its README.md names: {patterns}. Download them, "
            f"or give a file or a folder in it."
        )
    return Layout(folder, {split: files for split, files in splits.items() if files})


def _matches(folder: Path, patterns: list[str]) -> list[Path]:
    """The files in a folder that match patterns, in which ``**`` matches files, too."""
    paths = [
        path.relative_to(folder)
        for pattern in map(str, patterns)
        for path in sorted(folder.glob(f"{pattern}/*" if pattern.endswith("**") else pattern))
    ]
    return [folder / path for path in dict.fromkeys(paths) if _is_visible(path) and kind(path)]


def _layout_of_names(folder: Path) -> Layout:
    if (folder / "dataset_dict.json").is_file():
        names = _saved_json(folder / "dataset_dict.json", "splits")
        return Layout(folder, {str(name): _saved_files(folder / str(name)) for name in names})
    data_sets: dict[PurePath, dict[str, list[Path]]] = {}
    unnamed: list[Path] = []
    for file, named_by in _data_files(folder):
        if split_and_place := _split_and_place(named_by):
            split, place = split_and_place
            data_sets.setdefault(place, {}).setdefault(split, []).append(file)
        else:
            unnamed.append(file)
    if not data_sets and not unnamed:
        raise UserError(f"The folder {str(folder)!r} holds no {READABLE}. Unpack archives, if it holds such.")
    splits = [split for data_set in data_sets.values() for split in data_set]
    if len(set(splits)) < len(splits):
        raise _several(folder, [place.as_posix() for place in data_sets])
    files = {split: data_set[split] for data_set in data_sets.values() for split in data_set}
    return Layout(folder, {split: files[split] for split in sorted(files, key=_place_in_order)}, unnamed)


def _data_files(folder: Path) -> Iterator[tuple[Path, PurePath]]:
    """Every data file, and the path in the folder that names its split: its own, or that of the saved data set."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in paths if _is_visible(path)]
    saved = [
        path.parent for path in visible if path.name == "state.json" and path.with_name("dataset_info.json") in visible
    ]
    for place in saved:
        yield from ((file, place) for file in _saved_files(folder / place))
    for path in visible:
        if path.parent not in saved and kind(path) and not ABOUT_DATA.fullmatch(path.name):
            yield folder / path, path


def _is_visible(path: PurePath) -> bool:
    return not any(part.startswith((".", "__")) for part in path.parts)


def _saved_files(folder: Path) -> list[Path]:
    """The files of a data set as written by ``save_to_disk``; other files in its folder are caches.

    Raises:
        UserError: one of them is missing.
    """
    files = [folder / entry["filename"] for entry in _saved_json(folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{str(file)!r} is missing, which {str(folder / 'state.json')!r} names. Copy it again.")
    return files


def _saved_json(path: Path, key: str) -> Any:
    try:
        return read_json(path)[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is not what save_to_disk of the datasets library writes ({type(error).__name__}: {error}). "
            f"Save the data set again."
        ) from error


def _split_and_place(path: PurePath) -> tuple[str, PurePath] | None:
    """The split that a path names and the folder that holds the splits, or None if the path names no split.

    Inner parts of the path take precedence over outer ones.
    """
    for part in (path, *path.parents):
        shard = SHARD.match(part.name)
        if keyword := _keyword(part.name):
            place = part.parent.parent if part.parent.name == "data" else part.parent
            return (shard["split"] if shard and _keyword(shard["split"]) else keyword), place
    return None


def _keyword(name: str) -> str | None:
    """The word in a name that denotes a split; of several, that of the split which must be kept from the others."""
    words = [re.sub("(set|data|split)$", "", word) for word in re.findall(r"[^\W\d_]+", name.lower())]
    for split in ("test", "validation", "train"):
        for word in words:
            if word in SYNONYMS[split]:
                return word
    return None


def _place_in_order(split: str) -> int:
    return [_keyword(split) in words for words in SYNONYMS.values()].index(True)
