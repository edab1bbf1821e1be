"""What each way to find sensitivities gives the blocks of a model, and what is chosen by it."""

import json
from itertools import product

import numpy as np
from block_study import BlockStudy
from torch import Tensor

from qpruner.allocation.items import items_of
from qpruner.allocation.marginal import marginal_rises
from qpruner.allocation.mutual_information import MutualInformationConfig
from qpruner.allocation.observation import layer_information
from qpruner.allocation.rises import first_order_rises, measured_rises
from qpruner.allocation.solving import Choice, exact
from qpruner.calibration.text import Calibration
from qpruner.files import replacing
from qpruner.processes import Processes

TRIFLE = 1e-9


def sensitivities(study: BlockStudy) -> dict[str, list[float]]:
    """What a block gains by the wider width, by each method; from the study's folder if it is there already."""
    given = study.given
    path = None if given.folder is None else given.folder / f"sensitivities-{'-'.join(map(str, given.widths))}.json"
    if path is not None and path.exists():
        stored: dict[str, list[float]] = json.loads(path.read_text())
        return stored
    found = _sensitivities(study)
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found))
    return found


def _sensitivities(study: BlockStudy) -> dict[str, list[float]]:
    given, model = study.given, study.model.network.to(study.device)
    items, precisions = items_of(study.num_blocks, "block", ()), study.precisions
    calibration = Calibration.share(calibration_text(study), Processes.alone(study.device), batch_size=1024)
    by_method: dict[str, list[float]] = {}
    options = product(("histogram", "neighbours"), ("argmax", "log_probability"), ("mean", "norm", "max"))
    for estimator, prediction, summary in options:
        config = MutualInformationConfig(estimator=estimator, prediction=prediction, summary=summary)  # type: ignore[arg-type]
        name = f"mutual information: {estimator}, {summary}, {prediction}"
        by_method[name] = layer_information(model, calibration, config)
    kl, loss = measured_rises(model, study.bank, items, precisions, calibration)
    first_order = first_order_rises(model, study.bank, items, precisions, calibration)
    for name, rises in {"KL, measured": kl, "loss, measured": loss, "loss, first order": first_order}.items():
        by_method[name] = (rises[:, 0] - rises[:, 1]).tolist()
    for contexts in given.contexts:
        among = marginal_rises(model, study.bank, items, precisions, calibration, num_contexts=contexts, seed=0)
        by_method[f"KL among others, {contexts} contexts"] = among.kl[:, 0].tolist()
        by_method[f"loss among others, {contexts} contexts"] = among.loss[:, 0].tolist()
    return by_method


def calibration_text(study: BlockStudy) -> Tensor:
    """Text on which sensitivities are found."""  # [sequences, tokens]
    return study.data(0).calibration(study.given.sequences, study.given.sequence_length)


def with_largest(values: list[float], number: int, widths: list[int]) -> str:
    """The assignment with a number of blocks in the wider width that a method chooses.

    As in a fit: no gain below 0, and where nothing is gained more bits are still taken.
    """
    narrow, wide = map(str, sorted(widths))
    choices = [[Choice(0, max(value, 0.0) + TRIFLE), Choice(1, 0.0)] for value in values]
    return "".join((narrow, wide)[taken] for taken in exact(choices, number))


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; equal values share the mean of their ranks."""
    ranks = [
        [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]
        for values in (a, b)
    ]
    return float(np.corrcoef(*ranks)[0, 1])
