"""A story and the hand that writes it: facts are drawn once, sentences are free choices among paraphrases."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from random import Random
from typing import TypeVar

from qpruner.stories.vocabulary import BOYS, COLORS, GIRLS, NUMBERS, PEOPLE, THINGS, Person, Thing

Item = TypeVar("Item")

GAP = "_"


class Ending:
    """One way to end a story: paraphrases with a gap, what belongs into the gap, and what does not."""

    def __init__(self, right: object, wrong: object, *variants: str) -> None:
        self.right = str(right)
        self.wrong = str(wrong)
        self.variants = variants


@dataclass(frozen=True)
class Told:
    """What a story could have been instead.

    Attributes:
        pools: for the facts of the story, the options that they were drawn from.
        chosen: the ending that was chosen.
        sentence: the variant of it that was chosen, with its gap.
        others: the endings that were not chosen.
    """

    pools: tuple[Sequence[object], ...]
    chosen: Ending
    sentence: str
    others: tuple[Ending, ...]


@dataclass(frozen=True)
class Story:
    """A short story whose last sentence follows from the sentences before it.

    Attributes:
        facts: the plot and every fact value, in the order in which the plot draws them. Each value is told in the text,
            so two stories with other facts have other texts.
        prompt: all sentences but the last.
        ending: the last sentence; the facts told in the prompt determine it up to paraphrase.
        wrong_ending: the ending with one fact replaced by another of its kind that the prompt tells of something else,
            so that who only remembers what occurred cannot tell it from the right one.
        told: what the story could have been instead; of a story that nobody drew, nothing.
    """

    facts: tuple[str, ...]
    prompt: str
    ending: str
    wrong_ending: str
    told: Told | None = field(default=None, compare=False, repr=False)

    @property
    def text(self) -> str:
        """The whole story as one paragraph."""
        return f"{self.prompt} {self.ending}"

    @property
    def untold_ending(self) -> str:
        """The ending with the same fact replaced by a value of its kind that the story tells nowhere.

        It is ``wrong_ending`` where there is none, as for pronouns. It is drawn by the facts, so that the story is the
        same whether it is asked for or not.
        """
        if self.told is None:
            return self.wrong_ending
        random, right = Random("|".join(self.facts)), self.told.chosen.right
        parts = [right] if self._alike(right) else right.split(" ", 1)  # a thing is a color and a noun
        alike = [self._alike(part) for part in parts]
        if not all(alike):
            return self.wrong_ending
        return _capitalized(self.told.sentence.replace(GAP, " ".join(random.choice(values) for values in alike)))

    @property
    def alternatives(self) -> tuple[tuple[str, str], ...]:
        """An ending for each further fact that the plot can ask for, and the wrong one beside it."""
        return tuple(
            (_capitalized(variant.replace(GAP, ending.right)), _capitalized(variant.replace(GAP, ending.wrong)))
            for ending in (self.told.others if self.told else ())
            for variant in (Random(f"{self.prompt} {ending.right}").choice(ending.variants),)
        )

    def _alike(self, value: str) -> list[str]:
        """The values that a fact could have had instead, in the form of this one, without those that are told."""
        assert self.told is not None
        told = f"{self.prompt} {self.told.sentence}".lower()
        for pool in self.told.pools:
            forms = [_forms(option) for option in pool]
            names = {name for form in forms for name, text in form.items() if text == value}
            untold = (form for form in forms if form[""].lower() not in told)
            texts = {
                text for form in untold for name, text in form.items() if name in names and text.lower() not in told
            }
            if texts - {value}:
                return sorted(texts - {value})
        return []


class Tale:
    """A story in the making.

    Draws facts from a random generator, remembers them, and collects the sentences.
    """

    def __init__(self, plot: str, random: Random) -> None:
        self._random = random
        self._facts = [plot]
        self._sentences: list[str] = []
        self._pools: list[Sequence[object]] = []  # options of the facts so far

    def draw(self, options: Sequence[Item]) -> Item:
        """A fact: one of the options."""
        value = self._random.choice(options)
        self._facts.append(str(value))
        self._pools.append(options)
        return value

    def draw_two(self, options: Sequence[Item]) -> tuple[Item, Item]:
        """Two facts: different options."""
        first, second = self._random.sample(options, 2)
        self._facts += (str(first), str(second))
        self._pools.append(options)
        return first, second

    def friends(self) -> tuple[Person, Person]:
        """A girl and a boy in either order, so that every pronoun has one possible owner."""
        groups = (GIRLS, BOYS) if self._random.random() < 0.5 else (BOYS, GIRLS)
        return self.draw(groups[0]), self.draw(groups[1])

    def people(self, count: int) -> list[Person]:
        """Different people of any gender; the plot gives pronouns to one of them at most."""
        people = self._random.sample(PEOPLE, count)
        self._facts += (person.name for person in people)
        self._pools.append(PEOPLE)
        return people

    def things(self, count: int) -> list[Thing]:
        """Things that differ in both noun and color."""
        nouns, colors = self._random.sample(THINGS, count), self._random.sample(COLORS, count)
        things = [Thing(color, noun) for color, noun in zip(colors, nouns, strict=True)]
        self._facts += (str(thing) for thing in things)
        self._pools += (THINGS, COLORS)
        return things

    def number(self, low: int, high: int) -> int:
        """A count between `low` and `high`, both included."""
        value = self._random.randrange(low, high + 1)
        self._facts.append(NUMBERS[value])
        self._pools.append(NUMBERS[2:])  # of one there is no plural
        return value

    def pick(self, options: Sequence[Item]) -> Item:
        """A free choice, which is no fact."""
        return self._random.choice(options)

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in a free order."""
        return self._random.sample(items, len(items))

    def count_ending(self, right: int, told: tuple[int, ...], *variants: str) -> Ending:
        """An ending that asks for a count; the wrong answer is another count told in the story."""
        wrong = self.pick([count for count in told if count != right])
        return Ending(NUMBERS[right], NUMBERS[wrong], *variants)

    def say(self, *variants: str) -> None:
        """Tell one of the paraphrases."""
        self._sentences.append(_capitalized(self.pick(variants)))

    def maybe(self, *variants: str) -> None:
        """Tell one of the paraphrases or nothing; only for sentences that the facts can do without."""
        if self._random.random() < 0.5:
            self.say(*variants)

    def end(self, *endings: Ending) -> Story:
        """The finished story with one of the endings."""
        ending = self.pick(endings)
        sentence = self.pick(ending.variants)
        return Story(
            facts=tuple(self._facts),
            prompt=" ".join(self._sentences),
            ending=_capitalized(sentence.replace(GAP, ending.right)),
            wrong_ending=_capitalized(sentence.replace(GAP, ending.wrong)),
            told=Told(tuple(self._pools), ending, sentence, tuple(each for each in endings if each is not ending)),
        )


def _forms(option: object) -> dict[str, str]:
    """How a story may write an option: as it is, or a part of it, such as a place with its preposition."""
    parts = {part.name: str(getattr(option, part.name)) for part in fields(option)} if is_dataclass(option) else {}
    return {"": str(option), **parts}


def _capitalized(sentence: str) -> str:
    # str.capitalize would lower the names; a sentence that starts with a quote is written with its capital.
    return sentence[0].upper() + sentence[1:]
