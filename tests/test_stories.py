import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from qpruner.stories import Story, generate_stories, generate_story, generation, split_of
from qpruner.stories import vocabulary as words
from qpruner.stories.plots import PLOTS

NUMBER = re.compile(rf"\b({'|'.join(words.NUMBERS[2:])})\b", re.IGNORECASE)
GENDER = {person.name: person.he for person in words.PEOPLE}
ONE_PRONOUN_PLOTS = {"found_animal", "party", "present", "promise", "repair", "trip"}
FRIENDS_PLOTS = {
    "baking",
    "garden",
    "gathering",
    "hidden_things",
    "lost_thing",
    "sharing",
    "spoiled_day",
    "swap",
}


@pytest.fixture(scope="module")
def stories() -> list[Story]:
    random = Random("stories of the tests")
    return [generate_story(random) for _ in range(6000)]


def tokens(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def counts(text: str) -> list[int]:
    return [words.NUMBERS.index(word.lower()) for word in NUMBER.findall(text)]


def replaced(story: Story, ending: str | None = None) -> tuple[list[str], list[str]]:
    """What another ending, by default the wrong one, has instead of the words of the right one."""
    right, wrong = tokens(story.ending), tokens(ending or story.wrong_ending)
    while right and wrong and right[0] == wrong[0]:
        right, wrong = right[1:], wrong[1:]
    while right and wrong and right[-1] == wrong[-1]:
        right, wrong = right[:-1], wrong[:-1]
    return right, wrong


def test_golden_story() -> None:
    story = next(generate_stories("train", num_stories=1, seed=0))
    assert story.facts[:5] == ("lost_thing", "Alice", "Ben", "green mug", "yellow bracelet")
    assert story.facts[5:] == ("the garden", "the fairground", "mother")
    assert story.text == (
        "Alice loved the green mug that her mother had given her. One windy day Alice took it to the garden "
        "and met her friend Ben there. Ben showed Alice a yellow bracelet, and they had a lot of fun. On the "
        "way back they spent a little time at the fairground. That evening Alice could not find the green "
        "mug anywhere. Alice looked for it at the fairground, but had no luck. Then Ben went to look in the "
        "garden and saw something green under some leaves. Ben was proud that he had found the green mug."
    )
    assert story.wrong_ending == story.untold_ending == "Ben was proud that she had found the green mug."


def test_same_seed_gives_same_stories_and_fewer_give_a_prefix() -> None:
    long = list(generate_stories("train", num_stories=300, seed=7))
    assert len(long) == 300
    assert list(generate_stories("train", num_stories=300, seed=7)) == long
    assert list(generate_stories("train", num_stories=40, seed=7)) == long[:40]
    assert list(generate_stories("train", num_stories=0, seed=7)) == []
    assert list(generate_stories("train", num_stories=40, seed=8)) != long[:40]


def test_splits_share_neither_facts_nor_texts_whatever_the_seed() -> None:
    train = [
        *generate_stories("train", num_stories=3000, seed=0),
        *generate_stories("train", num_stories=1000, seed=1),
    ]
    validation = list(generate_stories("validation", num_stories=250, seed=0))
    test = [
        *generate_stories("test", num_stories=150, seed=0),
        *generate_stories("test", num_stories=150, seed=2),
    ]
    splits = (train, validation, test)
    facts = [{" ".join(story.facts) for story in split} for split in splits]
    texts = [{story.text for story in split} for split in splits]
    for sets in (facts, texts):
        assert [len(values) for values in sets] == [4000, 250, 300]
        assert len(set.union(*sets)) == 4550


def test_split_shares(stories: list[Story]) -> None:
    shares = Counter(split_of(story) for story in stories)
    assert shares["train"] / len(stories) == pytest.approx(0.90, abs=0.012)
    assert shares["validation"] / len(stories) == pytest.approx(0.05, abs=0.01)
    assert shares["test"] / len(stories) == pytest.approx(0.05, abs=0.01)


def test_split_depends_on_the_facts_alone(stories: list[Story]) -> None:
    for story in stories[:500]:
        assert split_of(Story(story.facts, "Other words.", "Right.", "Wrong.")) == split_of(story)


@pytest.mark.parametrize(
    ("split", "num_stories", "message"),
    [
        ("train", -3, "num_stories is -3: .* 0 or more"),
        ("dev", 3, "split is 'dev': pass one of train, validation, test"),
    ],
)
def test_bad_arguments_are_named_before_the_first_story(split: str, num_stories: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_stories(split, num_stories=num_stories, seed=0)  # type: ignore[arg-type]


def test_every_plot_occurs_about_equally_often(stories: list[Story]) -> None:
    plots = Counter(story.facts[0] for story in stories)
    assert set(plots) == {plot.__name__ for plot in PLOTS} == ONE_PRONOUN_PLOTS | FRIENDS_PLOTS | {"race"}
    assert min(plots.values()) > 0.75 * len(stories) / len(PLOTS)


def test_texts_are_plain_paragraphs(stories: list[Story]) -> None:
    for story in stories:
        assert story.text == f"{story.prompt} {story.ending}"
        assert re.fullmatch(r"""[A-Za-z ,.!?"']+""", story.text), story.text
        assert "  " not in story.text
        assert story.text[0] == '"' or story.text[0].isupper()
        assert story.text.count('"') % 2 == 0, story.text
        assert not re.search(r'([.!?]|[.]") [a-z]', story.text), story.text
        assert 50 <= len(story.text.split()) <= 130


def test_facts_are_told_and_hardly_ever_repeat(stories: list[Story]) -> None:
    for story in stories:
        text = story.text.lower()
        assert all(fact.lower() in text for fact in story.facts[1:]), story
    assert len({story.facts for story in stories}) == len({story.text for story in stories}) == len(stories)


def test_articles(stories: list[Story]) -> None:
    found: Counter[str] = Counter()
    for story in stories:
        for article, noun in re.findall(r"\b(an?) (\w+)", story.text, re.IGNORECASE):
            assert (article.lower() == "an") == (noun[0].lower() in "aeiou"), (article, noun)
            found[article.lower()] += 1
    assert found["a"] > 5000
    assert found["an"] > 500


def test_counts_have_plurals(stories: list[Story]) -> None:
    plurals = {"coins", "pieces", "friends", "rocks", *words.TREASURES, *words.CROPS}
    for story in stories:
        followers = {word for _, word in re.findall(NUMBER.pattern + r" (\w+)", story.text)}
        assert followers <= plurals | {"of", "more", "left", "in"}, story.text


def test_one_protagonist_has_one_pronoun(stories: list[Story]) -> None:
    pronouns = {"she": {"she", "her"}, "he": {"he", "him", "his"}}
    for story in stories:
        if story.facts[0] in ONE_PRONOUN_PLOTS:
            used = {word.lower() for word in tokens(story.text)} & (pronouns["he"] | pronouns["she"])
            assert used <= pronouns[GENDER[story.facts[1]]], story.text


def test_friends_have_different_pronouns(stories: list[Story]) -> None:
    possessives = 0
    for story in stories:
        if story.facts[0] in FRIENDS_PLOTS:
            first, second = story.facts[1:3]
            assert GENDER[first] != GENDER[second]
            for owner, friend in re.findall(r"\b([Hh]is|[Hh]er) (?:best )?friend ([A-Z]\w+)", story.text):
                assert friend == second
                assert owner.lower() == ("his" if GENDER[first] == "he" else "her")
                possessives += 1
    assert possessives > 500


def test_sharing_adds_up(stories: list[Story]) -> None:
    asked: Counter[str] = Counter()
    for story in (story for story in stories if story.facts[0] == "sharing"):
        giver, taker = story.facts[1:3]
        had, taker_had, given = counts(story.prompt)
        asks_giver = giver in story.ending
        assert asks_giver != (taker in story.ending)
        assert counts(story.ending) == [had - given if asks_giver else taker_had + given], story.text
        assert counts(story.wrong_ending)[0] in {had, taker_had, given} - set(counts(story.ending))
        assert all(2 <= count <= 12 for count in (had, taker_had, given, *counts(story.ending)))
        asked["giver" if asks_giver else "taker"] += 1
    assert min(asked["giver"], asked["taker"]) > 100


def test_gathered_things_add_up(stories: list[Story]) -> None:
    sums = 0
    for story in (story for story in stories if story.facts[0] == "gathering"):
        first, later, _ = counts(story.prompt)
        if counts(story.ending):
            assert counts(story.ending) == [first + later], story.text
            sums += 1
    assert sums > 100


def test_wrong_ending_replaces_one_fact_by_something_the_prompt_tells(stories: list[Story]) -> None:
    for story in stories:
        right, wrong = replaced(story)
        assert right, story
        assert wrong, story
        assert right != wrong
        if right[0].lower() in {"he", "she"}:
            assert {right[0], wrong[0]} == {"he", "she"}
            continue
        assert len(right) <= 4
        assert len(wrong) <= 4
        # The last word is the one that verbs and prepositions leave alone: `washed the car`, `at the beach`.
        assert wrong[-1].lower() in {word.lower() for word in tokens(story.prompt)}, story


def test_untold_ending_replaces_the_same_fact_by_something_that_the_story_tells_nowhere(stories: list[Story]) -> None:
    same = 0
    for story in stories:
        right, wrong = replaced(story)
        same_right, untold = replaced(story, story.untold_ending)
        if right[0].lower() in {"he", "she"}:
            assert story.untold_ending == story.wrong_ending
            same += 1
            continue
        assert story.untold_ending != story.wrong_ending, story
        assert set(same_right) & set(right), story  # the same gap, but for words that both values share
        assert f" {' '.join(untold)} ".lower() not in f" {' '.join(tokens(story.prompt))} ".lower(), story
    assert same < len(stories) / 20


def test_word_lists_are_long_and_their_words_differ() -> None:
    lists = {
        "PEOPLE": 40, "THINGS": 40, "PLACES": 20, "ANIMALS": 12, "COLORS": 10, "CONTAINERS": 12, "FAVORS": 12,
        "TREASURES": 20, "CAKES": 12, "PET_NAMES": 16, "JOBS": 12,
    }  # fmt: skip
    for name, length in lists.items():
        values = [str(value) for value in getattr(words, name)]
        assert len(set(values)) == len(values) >= length, name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("PEOPLE", "PET_NAMES"), ("THINGS", "CONTAINERS"), ("THINGS", "VEHICLES"), ("THINGS", "SNACKS"),
        ("THINGS", "CAKES"), ("OUTINGS", "PASTIMES"), ("TREASURES", "BAGS"), ("CAKES", "INGREDIENTS"),
    ],
)  # fmt: skip
def test_lists_of_one_story_share_no_word(first: str, second: str) -> None:
    kinds = [{str(value) for value in getattr(words, name)} for name in (first, second)]
    assert not kinds[0] & kinds[1]


def test_stories_are_generated_one_by_one() -> None:
    endless = generate_stories("train", num_stories=10**9, seed=0)
    assert list(islice(endless, 3)) == list(generate_stories("train", num_stories=3, seed=0))


def test_no_text_is_given_twice(stories: list[Story], monkeypatch: pytest.MonkeyPatch) -> None:
    twice = iter([story for story in stories for _ in range(2)])
    monkeypatch.setattr(generation, "generate_story", lambda random: next(twice))
    expected = [story for story in stories if split_of(story) == "test"][:20]
    assert list(generate_stories("test", num_stories=20, seed=0)) == expected
