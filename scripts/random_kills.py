"""Kills a fit, a search and a calibration at random moments, repeats each until it ends, and compares what it left.

    python scripts/random_kills.py FOLDER --kills 30

The commands are the true ones, each in a copy of this process, which has imported the libraries and written nothing;
they are killed by SIGKILL. A moment is drawn evenly from the time that an undisturbed session takes, at most three of
them for one run, whose seed is printed with what it wrote last each time. What a run leaves is compared with what an
undisturbed one left, file by file: names, all bytes of tensors, plans, scores, losses and settings, without what tells
of time, memory and the place; recorded logits to the last digits. A half-written file that stays behind is a
difference.

A trial that is cut off twice fails by intention, for it may be what ends the process. So a search is not killed in the
second attempt of a trial: the process is stopped, and where it is at one, goes on until that is over.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tiny_runs import command_of, import_libraries, run_command, tiny_base, write_config

KINDS = ("fit", "search", "calibration")
KILLS_OF_A_RUN = 3
MEASURED = {
    "seconds",
    "time",
    "assemble",
    "train",
    "evaluate",
    "all",
    "peak_training",
    "peak_inference",
    "sessions",
    "files",
}
"""Entries that differ between two runs of the same; the files that a manifest lists are compared themselves."""
OF_EACH_SESSION = {"run.log", "report.md", "README.md", ".lock", "loss.png"}
"""Files that tell of time, of sessions, or of nothing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="place for the runs; those that were equal are removed")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--kills", type=int, default=30, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; the next has the next one")
    given = parser.parse_args()
    import_libraries()
    folder = given.folder.absolute()
    base = folder / "base"
    making = get_context("fork").Process(target=tiny_base, args=[base])  # this process begins no threads
    making.start()
    making.join()
    differences = [wrong for kind in given.kinds for wrong in killed_runs(folder, kind, base, given.kills, given.seed)]
    print(f"{len(differences)} runs ended otherwise than an undisturbed one." if differences else "All are equal.")
    sys.exit(bool(differences))


def killed_runs(folder: Path, kind: str, base: Path, kills: int, seed: int) -> Iterator[str]:
    """Runs that are killed, until there were so many kills; the names of those that ended otherwise than others."""
    whole = write_config(folder / f"{kind}-whole" / "config.yaml", kind, base)
    shutil.rmtree(whole.parent / "run", ignore_errors=True)
    since = time.perf_counter()
    told = session(kind, whole)
    seconds = time.perf_counter() - since
    print(f"{kind}: undisturbed, {told} after {seconds:.1f} s", flush=True)
    expected = dict(content_of(whole.parent))
    done = 0
    while done < kills:
        config = write_config(folder / f"{kind}-{seed}" / "config.yaml", kind, base)
        shutil.rmtree(config.parent / "run", ignore_errors=True)
        moments, told = random.Random(seed), [""]
        while not told[-1].startswith("ended"):
            may_kill = len(told) <= KILLS_OF_A_RUN and done < kills
            told.append(session(kind, config, moments.uniform(0, seconds) if may_kill else None))
            done += told[-1].startswith("killed")
        found = dict(content_of(config.parent))
        others = differing(expected, found)
        print(f"{kind}, seed {seed}: {'; '.join(told[1:])}: {'DIFFERS in ' + ', '.join(others) if others else 'equal'}")
        sys.stdout.flush()
        if others:
            yield config.parent.name
        else:
            shutil.rmtree(config.parent)
        seed += 1


def begin(kind: str, config: Path, printed: Path) -> Any:
    """A process that runs the command, whose tokens are kept beside the run.

    Args:
        kind: fit, search or calibration.
        config: configuration of the run.
        printed: file that gets what is printed.
    """
    environment = {"XDG_CACHE_HOME": str(config.parent / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [command_of(kind), "--config", str(config)], printed, environment
    process = get_context("fork").Process(target=run_command, args=arguments)
    process.start()
    return process


def session(kind: str, config: Path, seconds: float | None = None) -> str:
    """Runs the command once, and kills it after some seconds, if any are given; tells what came of it."""
    process = begin(kind, config, config.with_name("printed.txt"))
    process.join(seconds)
    while process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        if not in_second_attempt(config.parent / "run"):
            last = last_written(config.parent)
            process.kill()
            process.join()
            return f"killed after {seconds:.2f} s, when {last} was written last"
        os.kill(process.pid, signal.SIGCONT)
        process.join(0.01)
    return "ended" if process.exitcode == 0 else f"ended with status {process.exitcode}"


def in_second_attempt(run: Path) -> bool:
    """Whether a trial runs that was cut off before."""
    for ledger in (run / "ledger.jsonl", run / "variants.jsonl"):
        attempts: dict[int, int] = {}
        for entry in records(ledger):
            if entry["record"] == "started":
                attempts[entry["trial"]] = attempts.get(entry["trial"], 0) + 1
            elif entry["record"] in ("finished", "failed"):
                attempts.pop(entry["trial"], None)
        if any(number > 1 for number in attempts.values()):
            return True
    return False


def records(ledger: Path) -> Iterator[dict[str, Any]]:
    """The records of a ledger behind its header; a last one that is half written is none."""
    for line in ledger.read_text().splitlines()[1:] if ledger.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            return


def last_written(folder: Path) -> str:
    times = {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "printed.txt"
    }
    return str(max(times, key=lambda path: times[path]).relative_to(folder))


def content_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """What a run left: of each file its name, and what is in it as far as two runs of the same are to agree."""
    from safetensors.torch import load_file

    from qpruner.records.report import scalars

    run = folder / "run"
    for tag in ("train/loss", "val/loss", "search/loss"):
        yield tag, scalars(run / "tensorboard", tag)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if "tensorboard" in path.parts or path.name in ("config.yaml", "printed.txt"):
            continue
        if path.name in OF_EACH_SESSION:
            yield name, None
        elif path.suffix == ".jsonl":
            yield name, [without_measured(entry) for entry in in_order(path)]
        elif path.suffix == ".json":
            text = path.read_text().replace(str(folder), "FOLDER")
            yield name, without_measured(json.loads(text))
        elif path.name == "logits.safetensors":
            yield name, load_file(path)["logits"]
        elif path.suffix == ".ckpt":
            yield name, digest_of_checkpoint(path)
        else:
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what two runs left that is not the same."""
    return sorted(name for name in expected.keys() | found.keys() if not agree(expected.get(name), found.get(name)))


def agree(expected: Any, found: Any) -> bool:
    """Whether two things are the same; logits, which no run goes on from, to the last digits.

    Where weights lie in memory decides in which order a processor adds, and read from a file they lie elsewhere.
    """
    import torch

    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return torch.allclose(expected, found, rtol=0, atol=1e-5 * float(expected.std()))
    return type(expected) is type(found) and expected == found


def in_order(ledger: Path) -> list[dict[str, Any]]:
    """Outcomes by trial; how often a trial was started is not the same in a run that was killed."""
    outcomes = [entry for entry in records(ledger) if entry["record"] in ("finished", "failed")]
    return sorted(outcomes, key=lambda entry: entry["trial"])


def without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_measured(entry) for key, entry in value.items() if key not in MEASURED}
    return [without_measured(entry) for entry in value] if isinstance(value, list) else value


def digest_of_checkpoint(path: Path) -> str:
    """Of the adapters, the state of the optimizer, and the steps."""
    import torch

    checkpoint = torch.load(path, weights_only=True)
    digest = hashlib.sha256(str(checkpoint["global_step"]).encode())

    def add(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + value.numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(f"{name}.{key}", value[key])
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                add(f"{name}.{number}", entry)
        else:
            digest.update(f"{name} {value}".encode())

    add("adapters", checkpoint["state_dict"])
    add("optimizers", checkpoint["optimizer_states"])
    return digest.hexdigest()


if __name__ == "__main__":
    main()
