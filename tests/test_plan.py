import json
import re
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from qpruner.errors import UserError
from qpruner.plan import (
    DENSE,
    UNITS,
    Architecture,
    CompressionPlan,
    LayerPlan,
    Leading,
    Precision,
    describe_differences,
)

MODEL = Architecture("llama", 64, 16, 2, (4, 4), (12, 10))
PRECISION = {
    "qkv": Precision("int", 4, 128),
    "o": DENSE,
    "gate_up": Precision("nf", 4, 64),
    "down": Precision("int", 8, -1),
}
PLAN = CompressionPlan(
    MODEL,
    "ab12",
    (LayerPlan((0, 2, 3), (0, 1, 2, 5), PRECISION), LayerPlan((1,), (3, 4, 9), dict.fromkeys(UNITS, DENSE))),
    embedding=Precision("nf", 4, 64),
    head=Precision("int", 8),
)
TEXT = """\
{
  "kind": "qpruner plan",
  "version": 2,
  "architecture": {"model_type": "llama", "hidden_size": 64, "head_dim": 16, "queries_per_group": 2, \
"kv_groups": [4, 4], "ffn_channels": [12, 10]},
  "base_sha256": "ab12",
  "embedding": {"format": "nf", "bits": 4, "group": 64},
  "head": {"format": "int", "bits": 8, "group": null},
  "hidden": null,
  "layers": [
    {"kv_groups": "0 2-3",
     "ffn_channels": "0-2 5",
     "precision": {"qkv": {"format": "int", "bits": 4, "group": 128}, \
"o": {"format": "dense", "bits": 16, "group": null}, \
"gate_up": {"format": "nf", "bits": 4, "group": 64}, \
"down": {"format": "int", "bits": 8, "group": -1}}},
    {"kv_groups": "1",
     "ffn_channels": "3-4 9",
     "precision": {"qkv": {"format": "dense", "bits": 16, "group": null}, \
"o": {"format": "dense", "bits": 16, "group": null}, \
"gate_up": {"format": "dense", "bits": 16, "group": null}, \
"down": {"format": "dense", "bits": 16, "group": null}}}
  ]
}
"""


def altered(change: Callable[[Any], Any]) -> str:
    """The plan's JSON after a change to its content."""
    content = json.loads(TEXT)
    change(content)
    return json.dumps(content)


def refusal(text: str) -> str:
    with pytest.raises(UserError) as error:
        CompressionPlan.from_json(text)
    return str(error.value)


# JSON.


def test_a_plan_is_written_one_line_a_part() -> None:
    assert PLAN.to_json() == TEXT


def test_a_plan_that_was_written_reads_as_the_same_plan(tmp_path: Path) -> None:
    assert CompressionPlan.from_json(TEXT) == PLAN
    PLAN.write(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == TEXT
    assert CompressionPlan.read(tmp_path / "plan.json") == PLAN


def test_a_plan_without_fingerprint_reads_as_the_same_plan() -> None:
    plan = replace(PLAN, base_sha256=None)
    assert CompressionPlan.from_json(plan.to_json()) == plan


def test_a_person_can_edit_a_plan() -> None:
    text = TEXT.replace('"ffn_channels": "0-2 5"', '"ffn_channels": "0-3  5 6 11"')
    text = text.replace('"down": {"format": "int", "bits": 8, "group": -1}', '"down": {"format": "int", "bits": 2}')
    expected = LayerPlan((0, 2, 3), (0, 1, 2, 3, 5, 6, 11), PRECISION | {"down": Precision("int", 2)})
    assert CompressionPlan.from_json(text) == replace(PLAN, layers=(expected, PLAN.layers[1]))


def test_a_plan_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAN.base_sha256 = "cd34"  # type: ignore[misc]


# Two segments and orders.

INT8 = Precision("int", 8)
LED = Precision("int", 4, 64, Leading(20, INT8))
LED_2 = Precision("int", 4, 64, Leading(2, INT8))


def test_orders_and_leading_columns_are_written_and_read() -> None:
    order = tuple(range(32, 64)) + tuple(range(32))
    first = LayerPlan((3, 0, 2), (5, 8, 9, 0, 1), PRECISION | {"qkv": LED})
    plan = replace(PLAN, layers=(first, PLAN.layers[1]), hidden=order)
    text = plan.to_json()
    assert '"hidden": "32-63 0-31"' in text
    assert '{"kv_groups": "3 0 2"' in text and '"ffn_channels": "5 8-9 0-1"' in text
    assert (
        '"qkv": {"format": "int", "bits": 4, "group": 64, '
        '"leading": {"columns": 20, "precision": {"format": "int", "bits": 8, "group": null}}}' in text
    )
    assert CompressionPlan.from_json(text) == plan


def test_a_plan_of_version_1_reads_as_what_it_meant() -> None:
    assert CompressionPlan.from_json(altered(lambda c: (c.pop("hidden"), c.update(version=1)))) == PLAN


@pytest.mark.parametrize(("unit", "columns"), [("qkv", 64), ("o", 96), ("gate_up", 64), ("down", 4)])
def test_fewer_columns_lead_than_a_linear_has(unit: str, columns: int) -> None:
    def leading(number: int) -> CompressionPlan:
        led = replace(LED, leading=replace(LED.leading, columns=number))  # type: ignore[type-var]
        first = replace(PLAN.layers[0], precision={**PRECISION, unit: led})
        return replace(PLAN, layers=(first, PLAN.layers[1]))

    leading(columns - 1)
    message = (
        f"^{unit} of layer 0 has {columns} input columns, of which {columns} cannot lead. Give at most {columns - 1},"
    )
    with pytest.raises(UserError, match=message):
        leading(columns)


def test_fewer_columns_of_tables_lead_than_the_hidden_size() -> None:
    replace(PLAN, head=replace(LED, leading=Leading(63, INT8)))
    for table, name in (("embedding", "The token embedding"), ("head", "The head")):
        with pytest.raises(UserError, match=f"^{name} has 64 input columns, of which 64 cannot lead"):
            replace(PLAN, **{table: replace(LED, leading=Leading(64, INT8))})


def test_keeping_units_follows_with_what_leads() -> None:
    led = {**PRECISION, "qkv": LED, "o": replace(LED, leading=Leading(40, INT8)), "down": LED_2}
    plan = replace(PLAN, layers=(replace(PLAN.layers[0], precision=led), PLAN.layers[1]))
    layer = plan.keeping([((2, 1), (3, 0, 1)), ((0,), (0,))]).layers[0]
    assert (layer.kv_groups, layer.ffn_channels) == ((3, 2), (5, 0, 1))
    # Group 1 has columns 32 to 63 of o, of which 8 lead; of the channels kept, two are among the first two.
    assert layer.precision["qkv"] == LED
    assert layer.precision["o"] == replace(LED, leading=Leading(8, INT8))
    assert layer.precision["down"] == LED_2


def test_an_order_of_the_hidden_channels_composes() -> None:
    turned = PLAN.reordered([*range(1, 64), 0])
    assert turned.hidden == (*range(1, 64), 0)
    assert turned.reordered([*range(1, 64), 0]).hidden == (*range(2, 64), 0, 1)
    assert turned.widths == PLAN.widths and turned.layers == PLAN.layers
    with pytest.raises(UserError, match="^hidden holds whole numbers"):
        replace(PLAN, hidden=(0.0, *range(1, 64)))


def test_ranks_are_written_and_read_and_stay_with_their_layer() -> None:
    plan = PLAN.with_ranks([3, None])
    text = plan.to_json()
    assert '"down": {"format": "int", "bits": 8, "group": -1}}, "rank": 3},' in text and text.count("rank") == 1
    assert CompressionPlan.from_json(text) == plan and plan.ranks == [3, None]
    assert plan.keeping([((0,), (1,)), ((0,), (0,))]).ranks == [3, None]
    assert plan.with_precision([dict.fromkeys(UNITS, DENSE)] * 2).ranks == [3, None]
    assert plan.with_ranks([None, None]).to_json() == TEXT


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_a_rank_is_a_whole_number_from_1(rank: Any) -> None:
    with pytest.raises(UserError, match="whole number of at least 1, not .* Leave it out for --model.lora.r"):
        CompressionPlan.from_json(altered(lambda c: c["layers"][1].update(rank=rank)))


# What is refused.


@pytest.mark.parametrize(("kept", "text"), [((), ""), ((1, 1), "1 1"), ((2, 0, 2), "2 0 2"), ((-1, 0), "-1-0")])
def test_kept_units_are_some_from_0_and_none_twice(kept: tuple[int, ...], text: str) -> None:
    for name, groups, channels in (("kv_groups", kept, (0,)), ("ffn_channels", (0,), kept)):
        message = f"{name} must be numbers from 0, at least one and none twice, not {text!r}."
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            LayerPlan(groups, channels, dict.fromkeys(UNITS, DENSE))


def test_every_quantization_unit_needs_its_precision() -> None:
    allowed = "^A layer has a precision for each of qkv, o, gate_up, down; found "
    with pytest.raises(UserError, match=allowed + "qkv, o, gate_up.$"):
        LayerPlan((0,), (0,), dict.fromkeys(UNITS[:3], DENSE))
    with pytest.raises(UserError, match=allowed + "qkv, o, gate_up, down, up.$"):
        LayerPlan((0,), (0,), dict.fromkeys((*UNITS, "up"), DENSE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("base_sha256"), "The plan is not as it should be: base_sha256 missing."),
        (lambda c: c.pop("head"), "The plan is not as it should be: head missing."),
        (lambda c: c["embedding"].update(bits=0), "A weight has 1 to 16 bits, not 0."),
        (lambda c: c.update(note="mine"), "The plan is not as it should be: note unknown."),
        (
            lambda c: (c.pop("layers"), c.update(layer=[])),
            "The plan is not as it should be: layers missing. layer unknown.",
        ),
        (lambda c: c["architecture"].pop("head_dim"), "The plan is not as it should be: head_dim missing."),
        (lambda c: c["architecture"].update(heads=8), "The plan is not as it should be: heads unknown."),
        (
            lambda c: (c["layers"][1].pop("kv_groups"), c["layers"][1].pop("precision")),
            "The plan is not as it should be: kv_groups, precision missing.",
        ),
        (lambda c: c["layers"][0].update(heads="0"), "The plan is not as it should be: heads unknown."),
        (lambda c: c.update(version=3), "The plan has version 3; this qpruner reads versions 1 and 2."),
        (lambda c: c.update(version=True), "The plan has version True; this qpruner reads versions 1 and 2."),
        (lambda c: c.pop("version"), "The plan has version None; this qpruner reads versions 1 and 2."),
        (lambda c: c.pop("hidden"), "The plan is not as it should be: hidden missing."),
        (lambda c: c.update(version=1), "The plan is not as it should be: hidden unknown."),
        (
            lambda c: c.update(hidden="1-63"),
            "hidden is an order of all channels from 0 to 63, each of them once, not '1-63'. Leave hidden null to keep "
            "the order that the model has.",
        ),
        (lambda c: c.update(kind="qpruner model"), 'This is no plan: it does not say "kind": "qpruner plan".'),
        (lambda c: c["layers"].pop(), "The plan has 1 layers; its model has 2."),
        (lambda c: c["layers"].append(c["layers"][0]), "The plan has 3 layers; its model has 2."),
        (lambda c: c["layers"][0].update(kv_groups="0-4"), "Layer 0 keeps KV groups up to 4; it has 0 to 3."),
        (lambda c: c["layers"][1].update(ffn_channels="0 10"), "Layer 1 keeps FFN channels up to 10; it has 0 to 9."),
        (
            lambda c: c["layers"][0].update(kv_groups="2 2"),
            "'2' in '2 2' must be a number or a range such as 4-7, of numbers that do not stand before it.",
        ),
        (
            lambda c: (c.pop("hidden"), c.update(version=1), c["layers"][0].update(kv_groups="2 1")),
            "'1' in '2 1' must be a number or a range such as 4-7, above those before it.",
        ),
        (
            lambda c: c["layers"][0].update(ffn_channels=" "),
            "ffn_channels must be numbers from 0, at least one and none twice, not ''.",
        ),
        (lambda c: c["layers"][0]["precision"]["o"].update(bits=0), "A weight has 1 to 16 bits, not 0."),
        (lambda c: c["layers"][0]["precision"]["o"].update(bits=17), "A weight has 1 to 16 bits, not 17."),
        (
            lambda c: c["layers"][0]["precision"].pop("o"),
            "A layer has a precision for each of qkv, o, gate_up, down; found qkv, gate_up, down.",
        ),
    ],
)
def test_an_altered_plan_is_refused(change: Callable[[Any], Any], message: str) -> None:
    assert refusal(altered(change)) == message


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["layers"][0].update(kv_groups=[0, 1]),
        lambda c: c["layers"][0].update(ffn_channels=3),
        lambda c: c["layers"][0].update(precision=[4, 4, 4, 4]),
        lambda c: c["layers"][0]["precision"].update(o=4),
        lambda c: c["layers"][0]["precision"]["o"].update(scale=4),
        lambda c: c["layers"][0]["precision"]["o"].pop("format"),
        lambda c: c["layers"][0]["precision"]["o"].update(group="128"),
        lambda c: c["layers"][0]["precision"]["o"].update(group=2.5),
        lambda c: c["architecture"].update(hidden_size="64"),
        lambda c: c["architecture"].update(kv_groups=[4.5, 4]),
        lambda c: c.update(layers=3),
        lambda c: c.update(embedding=4),
        lambda c: c["head"].update(scale=4),
        lambda c: c["layers"].__setitem__(0, "0-3"),
        lambda c: c.update(architecture=None),
        lambda c: c["architecture"].update(kv_groups=4),
        lambda c: c["architecture"].update(ffn_channels=["12", "10"]),
        lambda c: c.update(hidden=[1, 0]),
        lambda c: c["layers"][0]["precision"]["qkv"].update(leading=4),
        lambda c: c["layers"][0]["precision"]["qkv"].update(leading={"columns": 4}),
        lambda c: c["layers"][0]["precision"]["qkv"].update(leading={"columns": 4, "precision": 8}),
        lambda c: c["layers"][0]["precision"]["qkv"].update(leading={"columns": 4, "bits": 8}),
    ],
)
def test_an_entry_of_a_wrong_kind_is_refused(change: Callable[[Any], Any]) -> None:
    assert any(sign in refusal(altered(change)) for sign in ("of a wrong kind", "whole numbers", "A group holds"))


def test_what_is_no_json_object_is_no_plan() -> None:
    assert refusal("kept: 0-3").startswith("This is no plan: not valid JSON (Expecting value: line 1 column 1")
    assert refusal(TEXT[:-10]).startswith("This is no plan: not valid JSON (")
    for text in ("[]", "null", "3", '"plan"'):
        assert refusal(text) == 'This is no plan: it does not say "kind": "qpruner plan".'


def test_a_file_that_holds_no_plan_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "plan.json")
    with pytest.raises(UserError, match=f"^Cannot read {missing!r}: .*No such file"):
        CompressionPlan.read(tmp_path / "plan.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="^Cannot read '.*binary': .*utf-8"):
        CompressionPlan.read(tmp_path / "binary")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"""^'.*other.json': This is no plan: it does not say "kind"."""):
        CompressionPlan.read(tmp_path / "other.json")


# The plan and a model.


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(MODEL, model_type="mistral"), "model_type is llama there and mistral here"),
        (replace(MODEL, hidden_size=32), "hidden_size is 64 there and 32 here"),
        (replace(MODEL, head_dim=8, queries_per_group=4), "head_dim is 16 there and 8 here; "),
        (replace(MODEL, queries_per_group=4), "queries_per_group is 2 there and 4 here"),
        (replace(MODEL, kv_groups=(4, 3)), "kv_groups is (4, 4) there and (4, 3) here"),
        (replace(MODEL, ffn_channels=(12, 12)), "ffn_channels is (12, 10) there and (12, 12) here"),
    ],
)
def test_a_model_of_another_shape_is_refused(other: Architecture, difference: str) -> None:
    message = re.escape(f"The plan is for another model: {difference}") + ".*Make a plan for this one.$"
    with pytest.raises(UserError, match=message):
        PLAN.check(other, "ab12")


def test_other_weights_of_the_same_shape_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"other weights of the same shape \(ab12, here cd34\)") as caught:
        PLAN.check(MODEL, "cd34")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("planned", "found"), [("ab12", "ab12"), (None, "cd34"), ("ab12", None), (None, None)])
def test_equal_or_unknown_weights_pass_in_silence(planned: str | None, found: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace(PLAN, base_sha256=planned).check(MODEL, found)


def test_equal_architectures_have_no_differences() -> None:
    assert describe_differences(MODEL, replace(MODEL)) == ""


def test_a_dense_plan_keeps_everything() -> None:
    plan = CompressionPlan.dense(MODEL, "ab12")
    assert plan.widths == MODEL and plan.architecture == MODEL and plan.base_sha256 == "ab12"
    assert plan.layers == (
        LayerPlan((0, 1, 2, 3), tuple(range(12)), dict.fromkeys(UNITS, DENSE)),
        LayerPlan((0, 1, 2, 3), tuple(range(10)), dict.fromkeys(UNITS, DENSE)),
    )


def test_widths_count_what_is_kept() -> None:
    assert PLAN.widths == Architecture("llama", 64, 16, 2, (3, 1), (4, 3))
    assert PLAN.widths.num_layers == 2


def test_keeping_counts_among_what_is_kept_and_composes() -> None:
    once = PLAN.keeping([((0, 2), (1, 3)), ((0,), (0, 2))])
    assert [(layer.kv_groups, layer.ffn_channels) for layer in once.layers] == [((0, 3), (1, 5)), ((1,), (3, 9))]
    twice = once.keeping([((1,), (1,)), ((0,), (0,))])
    assert [(layer.kv_groups, layer.ffn_channels) for layer in twice.layers] == [((3,), (5,)), ((1,), (3,))]
    assert [layer.precision for layer in twice.layers] == [layer.precision for layer in PLAN.layers]
    assert (twice.architecture, twice.base_sha256) == (MODEL, "ab12")


def test_keeping_everything_changes_nothing() -> None:
    assert PLAN.keeping([(range(3), range(4)), (range(1), range(3))]) == PLAN


def test_keeping_nothing_of_a_layer_is_refused() -> None:
    with pytest.raises(UserError, match="^kv_groups must be numbers from 0, at least one and none twice, not ''.$"):
        PLAN.keeping([((), (0,)), ((0,), (0,))])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c["layers"][0]["precision"]["o"].update(bits=True), "1 to 16 bits, not True"),
        (lambda c: c["layers"][0]["precision"]["o"].update(format=3), "A format is a name, not 3"),
        (lambda c: c.update(base_sha256=3), "base_sha256 is a hash in hexadecimal or null, not 3"),
        (lambda c: c["architecture"].update(ffn_channels=[12]), "for each of its layers"),
    ],
)
def test_what_looks_like_a_value_and_is_none_is_refused(change: Callable[[Any], Any], said: str) -> None:
    assert said in refusal(altered(change))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, ""])
def test_text_that_json_chokes_on_is_refused(text: str) -> None:
    assert "This is no plan" in refusal(text)


# A slip of the pen does not fill the memory.


def test_more_units_than_any_model_has_are_refused_before_they_are_spelt_out() -> None:
    assert "widths of 1,000,000" in refusal(altered(lambda c: c["architecture"].update(ffn_channels=[10**7, 10])))
    assert "20,000,000 units in all" in refusal(
        altered(lambda c: c["architecture"].update(kv_groups=[4] * 21, ffn_channels=[10**6] * 21))
    )
    assert "at most 10,000 layers" in refusal(
        altered(lambda c: c["architecture"].update(kv_groups=[1] * 10**6, ffn_channels=[1] * 10**6))
    )
    assert "'0-1000001' in" in refusal(altered(lambda c: c["layers"][0].update(ffn_channels="0-1000001")))


def test_a_layer_too_wide_is_refused_before_the_next_is_read() -> None:
    text = altered(lambda c: (c["layers"][0].update(ffn_channels="0-999999"), c["layers"].__setitem__(1, "nonsense")))
    assert refusal(text) == "Layer 0 keeps FFN channels up to 999999; it has 0 to 11."


def test_a_file_larger_than_any_plan_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "plan.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(UserError, match="plan.json': This is no plan: it has 1,000,000,000 bytes"):
        CompressionPlan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["layers"][0].update(ffn_channels="9-0 " * 9999),
        lambda c: c["layers"][0]["precision"]["o"].update(format="x" * 9999),
        lambda c: c["architecture"].update(model_type="x" * 9999),
        lambda c: c["architecture"].update(kv_groups=[10**900] * 99),
        lambda c: c.update(base_sha256=["x"] * 9999),
        lambda c: c.update({"x" * 9999: 1}),
        lambda c: c.update(version="x" * 9999),
    ],
)
def test_a_refusal_is_short_whatever_was_in_the_plan(change: Callable[[Any], Any]) -> None:
    assert len(refusal(altered(change))) < 600
