"""The plots: each one draws its facts from a tale and tells them."""

from collections.abc import Callable

from qpruner.stories.adventure_plots import found_animal, promise, race, spoiled_day
from qpruner.stories.count_plots import garden, gathering, sharing
from qpruner.stories.gift_plots import baking, party, present, trip
from qpruner.stories.grammar import Story, Tale
from qpruner.stories.thing_plots import hidden_things, lost_thing, repair, swap

Plot = Callable[[Tale], Story]

# Appending a plot changes every generated story, because the plot is the first choice of a story.
PLOTS: tuple[Plot, ...] = (
    baking,
    found_animal,
    garden,
    gathering,
    hidden_things,
    lost_thing,
    party,
    present,
    promise,
    race,
    repair,
    sharing,
    spoiled_day,
    swap,
    trip,
)
