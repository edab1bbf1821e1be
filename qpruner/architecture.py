"""The widths of a model, layer by layer, as far as plans depend on them."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qpruner.errors import UserError, brief, cut
from qpruner.ranges import MOST_UNITS

MOST_LAYERS, MOST_IN_ALL = 10_000, 20_000_000
"""Limits on layers, and on units in all layers together: no model has more, and a typo must not exhaust memory."""


@dataclass(frozen=True)
class Architecture:
    """The widths of a model, layer by layer, as far as plans depend on them.

    Args:
        model_type: family, as transformers names it.
        hidden_size: width of the residual stream.
        head_dim: channels of a head.
        queries_per_group: query heads that read one key-value head.
        kv_groups: [layers], key-value heads of each layer, with their query heads.
        ffn_channels: [layers], intermediate channels of each layer; of a mixture of experts those of all its experts.
        experts: [layers], experts of each layer, 0 where it has a plain FFN; empty for models without experts.
        experts_per_token: experts that each token is sent to; 0 for models without experts.

    Raises:
        UserError: a width is not a positive integer or larger than that of any model, or lists differ in length.
    """

    model_type: str
    hidden_size: int
    head_dim: int
    queries_per_group: int
    kv_groups: tuple[int, ...]
    ffn_channels: tuple[int, ...]
    experts: tuple[int, ...] = ()
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model_type, str) or not re.fullmatch(r"[\w-]{1,80}", self.model_type):
            raise UserError(f"model_type is the name of a family, not {brief(self.model_type)}.")
        numbers = self.hidden_size, self.head_dim, self.queries_per_group, *self.kv_groups, *self.ffn_channels
        if not all(type(number) is int and number > 0 for number in numbers):
            raise UserError(f"The widths of an architecture are whole numbers above 0: {cut(self)}.")
        if not self.kv_groups or len(self.kv_groups) != len(self.ffn_channels):
            raise UserError(f"An architecture has KV groups and FFN channels for each of its layers: {cut(self)}.")
        if self.num_layers > MOST_LAYERS or max(numbers) > MOST_UNITS or sum(numbers) > MOST_IN_ALL:
            raise UserError(
                f"An architecture has at most {MOST_LAYERS:,} layers, widths of {MOST_UNITS:,} and {MOST_IN_ALL:,} "
                f"units in all: {cut(self)}."
            )
        if self.experts or self.experts_per_token:
            self._check_experts()

    def _check_experts(self) -> None:
        counts = self.experts_per_token, *self.experts
        if not all(type(number) is int and number >= 0 for number in counts) or len(self.experts) != self.num_layers:
            raise UserError(f"An architecture has a number of experts, or 0, for each of its layers: {cut(self)}.")
        for number, (experts, channels) in enumerate(zip(self.experts, self.ffn_channels, strict=True)):
            if experts and not 0 < self.experts_per_token <= experts:
                raise UserError(
                    f"Layer {number} has {experts} experts, but each token is sent to {self.experts_per_token} of "
                    f"them. Keep at least that many."
                )
            if experts and channels % experts:
                raise UserError(
                    f"Layer {number} has {channels} FFN channels in {experts} experts; all experts of a layer have as "
                    f"many."
                )

    @property
    def num_layers(self) -> int:
        return len(self.kv_groups)

    def channels_of_each(self, number: int) -> int:
        """FFN channels of a layer, or of each of its experts."""
        return self.ffn_channels[number] // max(1, self.num_experts(number))

    def num_experts(self, number: int) -> int:
        """Experts of a layer; 0 where it has a plain FFN."""
        return self.experts[number] if self.experts else 0

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON, without fields for experts where there are none."""
        data = asdict(self)
        if not self.experts:
            del data["experts"], data["experts_per_token"]
        return data


def by_expert(channels: Sequence[int], each: int) -> dict[int, list[int]]:
    """The FFN channels of each expert, counted from its first one; experts as they come.

    Args:
        channels: FFN channels of a layer, counted through all of its experts.
        each: number of channels of an expert.
    """
    experts: dict[int, list[int]] = {}
    for channel in channels:
        expert, place = divmod(channel, each)
        experts.setdefault(expert, []).append(place)
    return experts


def describe_differences(there: Architecture, here: Architecture) -> str:
    """The widths in which two architectures differ, or an empty string."""
    return "; ".join(
        f"{field.name} is {cut(getattr(there, field.name), 80)} there and {cut(getattr(here, field.name), 80)} here"
        for field in fields(Architecture)
        if getattr(there, field.name) != getattr(here, field.name)
    )
