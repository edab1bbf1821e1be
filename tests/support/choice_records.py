"""Records of the seven tasks in the layout of the Hugging Face hub, written for the tests."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any


def _choices(*texts: str, labels: str = "ABCDE") -> dict[str, list[str]]:
    return {"text": list(texts), "label": list(labels[: len(texts)])}


def _boolq(passage: str, question: str, label: int) -> dict[str, Any]:
    return {"question": question, "passage": passage, "label": label}


def _piqa(goal: str, sol1: str, sol2: str, label: int) -> dict[str, Any]:
    return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": label}


def _hellaswag(activity_label: str, ctx_a: str, ctx_b: str, label: str, *endings: str) -> dict[str, Any]:
    parts = {"ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}"}
    return {"activity_label": activity_label, **parts, "endings": list(endings), "label": label}


def _winogrande(sentence: str, option1: str, option2: str, answer: str) -> dict[str, Any]:
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}


def _arc(question: str, answer: str, choices: dict[str, list[str]]) -> dict[str, Any]:
    return {"question": question, "choices": choices, "answerKey": answer}


def _openbookqa(stem: str, answer: str, choices: dict[str, list[str]]) -> dict[str, Any]:
    return {"question_stem": stem, "choices": choices, "answerKey": answer}


RECORDS: dict[str, list[dict[str, Any]]] = {
    "boolq": [
        _boolq("A bee is an insect. -- Bees make honey.", "do bees make honey", 1),
        _boolq("Pluto was a planet until 2006.\nIt is not any more. ", "is pluto a planet", 0),
        _boolq("Café crème is coffee with cream.", "is there \u2028cream in a café crème", 1),
    ],
    "piqa": [
        _piqa("To boil an egg", "put it into boiling water", "put it into the freezer ", 0),
        _piqa("dresser", " replace the drawer's  pin", 'finish with a "bobby" pin', 1),
        _piqa("How do I sharpen {{a}} knife? ", "Whet it\non a stone.", "Whet it\\non butter.", 0),
    ],
    "hellaswag": [
        _hellaswag(
            "Roof shingle removal", "A man is sitting on a roof.", "he", "3", "falls.", "eats.", "sings.", "pulls."
        ),
        _hellaswag(
            "Home and Garden",
            "[header] How to paint a wall [title] Buy Paint. [step] Ask the shop.",
            "",
            "0",
            "[substeps] Take a brush.  Begin.",
            "Wait [for it to dry] first.",
            " Sleep [title] Wake up.",
            "Paint   the neighbour.",
        ),
        _hellaswag("Sumo", "Two men meet in a ring]", "tHE Smaller one [step]", "2", "wins", "cries]", "bows", "sits"),
    ],
    "winogrande": [
        _winogrande("Sarah was a better surgeon than Maria so _ got the easier cases.", "Sarah", "Maria", "2"),
        _winogrande("The trophy did not fit into the case as the _ was too big. ", "trophy", "case", "1"),
        _winogrande("He could not lift his son as the _  was weak; a_b.", "father ", "the son", "1"),
    ],
    "arc_easy": [
        _arc("Which is the largest?", "C", _choices("a mouse", "a cat", "a whale", "an ant")),
        _arc("What do plants need?", "2", _choices("sugar", "light", "milk", labels="12345")),
        _arc("Which melts? ", "E", _choices("stone", "iron", "gold", "glass", "ice")),
    ],
    "arc_challenge": [
        _arc(
            "A planet turns faster after an impact. What changes?", "B", _choices("Years.", "Days.", "Mass.", "Moons.")
        ),
        _arc("Which unit measures force?", "A", _choices("newton", "metre", "second", "'gram'")),
        _arc("How hot is it? It is", "C", _choices("10 °C", "20 °C", "30 °C", "40 °C")),
    ],
    "openbookqa": [
        _openbookqa("The sun is responsible for", "D", _choices("puppies", "wheels", "ash", "plants growing")),
        _openbookqa(
            "Gas can fill any container, and liquid ", " A", _choices("takes its form", "is", "was", "will be")
        ),
        _openbookqa("42", "B", _choices("is odd", "is even", "is prime", "is a letter")),
    ],
}
"""Three of each task, with what occurs in the data sets: markers, doubled spaces, spaces at the border, numbers."""

LOCAL: dict[str, list[dict[str, Any]]] = {
    "boolq": [{"question": "do bees make honey", "passage": "A bee is an insect.", "answer": True}],
    "hellaswag": [
        {
            "activity_label": "Sumo",
            "ctx": "Two men  meet. The",
            "endings": ["men bow  low.", "ring [wooden] falls.", "end", "start"],
            "label": 1,
        }
    ],
}
"""Records in the variants that are read beside the hub's layout."""

WORDS = (
    "the", "a", "red", "kite", "Tom's", "river,", "(cold)", "[step]", "[title]", "boil;", "1,000", "café", '"why"',
    "well-known", "e.g.", "50%", "sun.", "Then", "it", "slowly", "—", "ran!", "A/B", "'quoted'", "milk", "of", "42",
)  # fmt: skip


def many_records(task: str, number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Records of a task as the hub has them, of words drawn at random, now and then with two spaces or one at the end.

    Args:
        task: one of the seven tasks.
        number: number of records, no two of them alike.
        seed: seed of the words.
    """
    rng = Random(f"{task} {seed}")
    return [_drawn(task, rng, f"n{place}") for place in range(number)]


def _drawn(task: str, rng: Random, name: str) -> dict[str, Any]:
    def text(least: int, most: int) -> str:
        words = rng.choices(WORDS, k=rng.randint(least, most))
        parts = [word + rng.choices((" ", "  "), (9, 1))[0] for word in words]
        return "".join(parts).rstrip() + rng.choices(("", " "), (9, 1))[0]

    def choices(number: int) -> tuple[str, dict[str, list[str]]]:
        labels = rng.choice(("ABCDE", "12345"))[:number]
        return rng.choice(labels), _choices(*(text(1, 6) for _ in range(number)), labels=labels)

    match task:
        case "boolq":
            return _boolq(f"{name} {text(5, 40)}", text(3, 9), rng.randrange(2))
        case "piqa":
            return _piqa(f"{name} {text(1, 12)}", text(1, 20), text(1, 20), rng.randrange(2))
        case "hellaswag":
            endings = [f"falls {text(1, 15)}" for _ in range(4)]  # markers alone would leave none
            return _hellaswag(name, text(3, 30), text(0, 4), str(rng.randrange(4)), *endings)
        case "winogrande":
            sentence = f"{name} {text(3, 9).strip()} _ {text(2, 9)}"
            return _winogrande(sentence, text(1, 2), text(1, 2), str(rng.randint(1, 2)))
        case "openbookqa":
            return _openbookqa(f"{name} {text(1, 12)}", *choices(4))
    return _arc(f"{name} {text(2, 25)}", *choices(rng.choice((3, 4, 4, 5))))


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes a record a line, compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
