"""The README of a compressed model's folder: what it is, how good it is, and how it is loaded."""

from collections.abc import Sequence
from pathlib import Path

from qpruner.files import write_text
from qpruner.folder_manifest import ADAPTER, is_compressed, read_manifest
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunFolder
from qpruner.records.report import Summary, protocol_line, table, tasks_table

CARD = "README.md"
CODE = "modeling_compressed.py"


def write_model_card(folder: RunFolder, summary: Summary) -> None:
    """Writes the card of a run's model, with the figures of a summary; writes nothing if the run keeps no model.

    The manifest does not list the card, so that a person may edit it.
    """
    if is_compressed(folder.model):
        write_text(folder.model / CARD, model_card(folder.model, folder.path.name, summary))


def model_card(model: Path, name: str, summary: Summary) -> str:
    """The text of the card.

    Args:
        model: folder of the compressed model.
        name: name of the run that made it.
        summary: what was measured of its stages.
    """
    manifest = read_manifest(model)
    base, has_code = manifest["base"]["name"], CODE in manifest["files"]
    widths = CompressionPlan.read(model / "plan.json").widths
    of_layers = [number for number in widths.experts if number]
    experts = f" of {_between(of_layers)} experts" if of_layers else ""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    # A name on the hub, unless it is a path or the name of the embedded model.
    if not Path(base).expanduser().exists() and not base.startswith(("/", "~", ".", "qpruner/")):
        lines.append(f"base_model: {base}")
    lines += ["tags: [qpruner, pruning, quantization, lora]", "---", "", f"# {name}", ""]
    lines += [
        f"`{base}`, compressed by qpruner: {_between(widths.kv_groups)} KV groups and "
        f"{_between(widths.ffn_channels)} FFN channels{experts} in each of its {widths.num_layers} layers.",
        "",
        table(summary),
        "",
    ]
    if (tasks := tasks_table(summary)) is not None:
        lines += [tasks, ""]
    lines += [protocol_line(summary), "", "What was done, in order:", ""]
    for number, step in enumerate(manifest["recipe"], 1):
        options = ", ".join(f"{option}={value!r}" for option, value in step["options"].items())
        lines.append(f"{number}. `{step['name']}({options})`")
    trusted, adapted = ", trust_remote_code=True" if has_code else "", manifest.get("adapters") is not None
    lines += ["", "## Use it", "", "```python", *(["from peft import PeftModel"] if adapted else [])]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += [f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{trusted})"]
    lines += [f"model = AutoModelForCausalLM.from_pretrained(FOLDER{trusted})"]
    if adapted:
        lines += [f'model = PeftModel.from_pretrained(model, FOLDER + "/{ADAPTER}")  # what recovery trained']
    lines += ["```", ""]
    if has_code:
        lines += [f"The code that this trusts is `{CODE}` in the folder; it needs torch and transformers alone.", ""]
    lines += ["With qpruner: `qpruner.load_compressed(FOLDER)`, and `qpruner verify FOLDER` tells whether it is whole."]
    return "\n".join(lines) + "\n"


def _between(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(most) if least == most else f"{least} to {most}"
