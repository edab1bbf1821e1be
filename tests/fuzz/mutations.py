"""Damage to files, drawn from a seeded generator: to bytes, to trees of plain data, and to safetensors."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Path_ = tuple[str | int, ...]
"""Keys and places from the root of a tree to one of its entries."""


# Bytes.


def cut(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(max(len(data), 1))]


def flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def insert(what: bytes) -> Callable[[Random, bytes], bytes]:
    def inserted(rng: Random, data: bytes) -> bytes:
        place = rng.randrange(len(data) + 1)
        return data[:place] + what + data[place:]

    return inserted


BYTES: dict[str, Callable[[Random, bytes], bytes]] = {
    "cut": cut,
    "flip": flip,
    "empty": lambda rng, data: b"",
    "random": lambda rng, data: rng.randbytes(rng.choice((1, 40, 3000))),
    "not UTF-8": insert(b"\xff\xfe\xc3"),
    "NUL": insert(b"\0"),
    "byte order mark": lambda rng, data: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda rng, data: data.decode("latin-1").encode("utf-16"),
    "twice": lambda rng, data: data + data,
    "zeros": lambda rng, data: b"\0" * len(data),
    "deep": lambda rng, data: b'{"a":' * 100_000,
    "long number": lambda rng, data: b"1" * 10_000,
}


# Plain data.

WRONG: tuple[Any, ...] = (
    None, True, 0, -1, 3, 2**40, 10**30, 10**400, 0.5, float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "/", "\ud800", "x" * 5000, [], [None], [[]], {}, {"a": 1}, {"class_path": "os.system"},
)  # fmt: skip
"""Values that are out of place nearly everywhere."""


def entries(tree: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every entry below the root."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield (*path, key)
            yield from entries(value, (*path, key))


def at(tree: Any, path: Path_) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def deep(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


def damaged_tree(rng: Random, tree: Any) -> tuple[Any, Path_]:
    """A copy of plain data with one entry damaged, and the path to the entry."""
    tree = copy.deepcopy(tree)
    paths = list(entries(tree))
    if not paths or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(WRONG)), ()
    # First how deep, then where: else the entries of the longest list would be nearly all that is drawn.
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    holder, key = at(tree, path[:-1]), path[-1]
    value = holder[key]
    match rng.choice(("delete", "wrong", "wrong", "wrong", "number", "deep", "duplicate", "rename", "swap", "text")):
        case "delete":
            del holder[key]
        case "number" if isinstance(value, int | float) and not isinstance(value, bool):
            holder[key] = rng.choice((-value, value + 1, value * 1000, value / 3, str(value), 2**31, -(2**63), 1e300))
        case "deep":
            holder[key] = deep(rng.choice((5, 300)))
        case "duplicate" if isinstance(holder, list):
            holder.extend([copy.deepcopy(value)] * rng.choice((1, 3, 1000)))
        case "rename" if isinstance(holder, dict):
            holder[rng.choice(("x", "", str(key).upper(), f"../{key}"))] = holder.pop(key)
        case "swap":
            other = rng.choice(paths)
            if other[: len(path)] != path and path[: len(other)] != other:  # neither lies in the other
                holder_of_other = at(tree, other[:-1])
                holder[key], holder_of_other[other[-1]] = holder_of_other[other[-1]], value
        case "text" if isinstance(value, str):
            holder[key] = BYTES[rng.choice(("cut", "flip", "twice", "NUL"))](rng, value.encode()).decode("latin-1")
        case _:
            holder[key] = copy.deepcopy(rng.choice(WRONG))
    return tree, path


def damage_json(rng: Random, data: bytes) -> bytes:
    return json.dumps(damaged_tree(rng, json.loads(data))[0]).encode()


def damage_json_line(rng: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    match rng.choice(("entry", "entry", "entry", "drop", "repeat", "swap")):
        case "entry":
            lines[number] = damage_json(rng, lines[number])
        case "drop":
            del lines[number]
        case "repeat":
            lines.insert(number, lines[number])
        case "swap":
            other = rng.randrange(len(lines))
            lines[number], lines[other] = lines[other], lines[number]
    return b"".join(line + b"\n" for line in lines)


# Safetensors: eight bytes with the length of a header, the header as JSON, and the tensors.


def damage_safetensors(rng: Random, data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    match rng.choice(("length", "tree", "dtype", "reshape", "rename", "swap", "overlap", "payload", "other width")):
        case "length":
            return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, len(data), 2**40, 2**63))) + data[8:]
        case "tree":
            header, _ = damaged_tree(rng, header)
        case "dtype":
            header[name]["dtype"] = rng.choice(
                ("F32", "F16", "BF16", "I32", "F64", "F8_E4M3", "U8", "BOOL", "C64", "X")
            )
        case "reshape":
            header[name]["shape"] = rng.choice((header[name]["shape"][::-1], [*header[name]["shape"], 1], [2**62, 4]))
        case "rename":
            header[rng.choice((f"{name}.x", "lm_head.x", ""))] = header.pop(name)
        case "swap":
            header[name], header[other] = header[other], header[name]
        case "overlap":
            header[name]["data_offsets"] = header[other]["data_offsets"]
        case "payload":
            payload = flip(rng, payload)
        case "other width":  # another dtype of the same width, so that the file itself is whole
            same = {"F32": "I32", "F16": "BF16", "BF16": "F16", "U8": "I8", "I8": "U8", "F64": "I64"}
            header[name]["dtype"] = same.get(header[name]["dtype"], "F32")
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def damage_file(rng: Random, path: Path) -> str:
    """Damages a file by its kind, or as any bytes, and says how."""
    kinds = {
        ".json": damage_json,
        ".jsonl": damage_json_line,
        ".safetensors": damage_safetensors,
    }
    if path.suffix in kinds and rng.random() < 0.75:
        path.write_bytes(kinds[path.suffix](rng, path.read_bytes()))
        return f"{path.name} inside"
    match rng.choice((*BYTES, "gone", "folder", "loop")):
        case "gone":
            path.unlink()
            how = "gone"
        case "folder":
            path.unlink()
            path.mkdir()
            how = "a folder"
        case "loop":
            path.unlink()
            path.symlink_to(path)
            how = "a link to itself"
        case how:
            path.write_bytes(BYTES[how](rng, path.read_bytes()))
    return f"{path.name} {how}"
