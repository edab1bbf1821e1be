"""Plots that count: shared treasures, a garden that is robbed, and a walk with a bag."""

from qpruner.stories import vocabulary as words
from qpruner.stories.grammar import Ending, Story, Tale
from qpruner.stories.vocabulary import NUMBERS, an


def sharing(tale: Tale) -> Story:
    """One friend gives the other some treasures; no count but the told ones occurs."""
    a, b = tale.friends()
    treasure = tale.draw(words.TREASURES)
    place = tale.draw(words.PLACES)
    had = tale.number(4, 12)
    given = tale.number(2, had - 2)
    had_before = tale.number(2, 12 - given)
    tale.say(
        f"{a} had {NUMBERS[had]} {treasure} in {a.his} bag.",
        f"{a} counted {a.his} {treasure} and found that there were {NUMBERS[had]} of them.",
        f"{a}'s pockets were full, for {a.he} had {NUMBERS[had]} {treasure}.",
    )
    tale.say(
        f"{a.he} took them along to {place}, where {a.he} met {b}.",
        f"{tale.pick(words.OPENINGS)} {a.he} met {a.his} friend {b} {place.at}.",
        f"{a.he} was playing {place.at} when {b} came along.",
    )
    tale.say(
        f"{b} had {NUMBERS[had_before]} {treasure} and looked a little sad.",
        f'"I have {NUMBERS[had_before]} {treasure}," said {b}, "but I need more."',
        f"{b} showed {a.him} {b.his} {treasure}, but there were just {NUMBERS[had_before]}.",
    )
    tale.say(
        f'"You can have some of mine," said {a}.',
        f'"Do you want some more?" asked {a}.',
        f"{a} did not have to think for long.",
    )
    tale.say(
        f"{a.he} gave {b} {NUMBERS[given]} of {a.his} {treasure}.",
        f"{a.he} took {NUMBERS[given]} {treasure} out and gave them to {b}.",
        f"{a.he} put {NUMBERS[given]} {treasure} into {b}'s hands.",
    )
    tale.say(
        f'"You are a good friend," said {b}.',
        f"{b} thanked {a.him} and smiled again.",
        f"{b}'s face grew bright.",
    )
    tale.say(
        "They played together until the sun went down.",
        "Then it was time to go home.",
        "After that they sat in the sun and talked.",
    )
    tale.maybe("It had been a good day.", "The birds were singing.", "A soft wind was blowing.")
    told = (had, given, had_before)
    return tale.end(
        tale.count_ending(
            had - given,
            told,
            f"Now {a} had _ {treasure} left.",
            f"When {a} counted {a.his} {treasure} at home, there were _ left.",
            f"{a} went home with _ {treasure}.",
        ),
        tale.count_ending(
            had_before + given,
            told,
            f"Now {b} had _ {treasure}.",
            f"When {b} counted {b.his} {treasure} at home, there were _ of them.",
            f"{b} went home with _ {treasure}.",
        ),
    )


def garden(tale: Tale) -> Story:
    """An animal eats some of the plants in a garden, until a friend builds a fence."""
    a, b = tale.friends()
    robbed, safe = tale.draw_two(words.CROPS)
    fur, animal = tale.draw(words.FUR), tale.draw(words.ANIMALS)
    thief = an(f"{fur} {animal}")
    planted = tale.number(4, 12)
    eaten = tale.number(2, planted - 2)
    planted_safe = tale.number(2, 12)
    tale.say(
        f"{a} planted {NUMBERS[planted]} {robbed} and {NUMBERS[planted_safe]} {safe} in the garden.",
        f"In {a}'s garden there were {NUMBERS[planted_safe]} {safe} and {NUMBERS[planted]} {robbed}.",
        f"In spring {a} put {NUMBERS[planted]} {robbed} and {NUMBERS[planted_safe]} {safe} into the ground.",
    )
    tale.say(
        f"{a.he} gave them water every day.",
        "The sun was warm, and they grew well.",
        f"Every morning {a.he} looked after them.",
    )
    tale.say(
        f"But one night {thief} came and ate {NUMBERS[eaten]} of the {robbed}.",
        f"Then {thief} got in and ate {NUMBERS[eaten]} of the {robbed}.",
        f"One morning {NUMBERS[eaten]} of the {robbed} were gone, and {thief} ran away.",
    )
    tale.say(
        f'"My poor {robbed}!" cried {a}.',
        f"{a} was very angry when {a.he} saw it.",
        f"{a} sat down on a stone and cried.",
    )
    tale.say(
        f'"I will help you," said {a.his} friend {b}.',
        f"{b}, who lived next door, heard about it.",
        f"{a.he} told {a.his} friend {b} about it.",
    )
    tale.say(
        f"{b} worked for a whole day and built a fence around the garden.",
        f"The same day {b} came with some wood and built a high fence.",
        f"{b} fetched {b.his} hammer and made a strong fence.",
    )
    tale.say(
        "After that the garden was safe.",
        "From then on nothing was stolen.",
        "The thief never came back.",
    )
    tale.say("Summer came, and then autumn.", "At last it was time for the harvest.", "The weeks went by.")
    told = (planted, eaten, planted_safe)
    return tale.end(
        tale.count_ending(
            planted - eaten,
            told,
            f"There were still _ {robbed} in the garden.",
            f"{a} was glad about the last _ {robbed}.",
        ),
        tale.count_ending(
            planted_safe,
            told,
            f"Nobody had touched the {safe}, so there were still _.",
            f"All the _ {safe} were fine.",
        ),
        Ending(
            b,
            a,
            "It was a good thing that _ had built the fence.",
            f"The {robbed} were saved by the fence that _ had built.",
        ),
        Ending(robbed, safe, f"The {animal} could only dream of the _ it had eaten."),
    )


def gathering(tale: Tale) -> Story:
    """Things are gathered at two places and counted together."""
    a, b = tale.friends()
    find = tale.draw(words.FINDS)
    place, last_place = tale.draw_two(words.PLACES)
    relative = tale.draw(words.RELATIVES)
    bag = tale.draw(words.BAGS)
    color, other_color = tale.draw_two(words.COLORS)
    mine, theirs = f"{color} {bag}", f"{other_color} {bag}"
    first = tale.number(2, 6)
    later = tale.number(2, 6)
    others = tale.number(2, 12)
    tale.say(
        f"{a} wanted to find some {find} for {a.his} {relative}.",
        f'"Can you bring me some {find}?" {a}\'s {relative} asked {a.him}.',
        f"{a}'s {relative} loved {find}, so {a} went out to look for some.",
    )
    tale.say(
        f"{a} took {an(mine)} along to put them in.",
        f"{a} left the house with {an(mine)}.",
    )
    tale.say(
        f"{place.at.capitalize()} {a.he} found {NUMBERS[first]} {find}.",
        f"{a.he} went to {place} and picked up {NUMBERS[first]} {find} there.",
        f"{a.he} found {NUMBERS[first]} {find} {place.at}.",
    )
    tale.say(
        f"Then {a.he} went on to {last_place} and found {NUMBERS[later]} more.",
        f"After that {a.he} looked {last_place.at} and got {NUMBERS[later]} more.",
        f"{a.he} wanted more, and {last_place.at} there were {NUMBERS[later]} more.",
    )
    tale.maybe("It was getting late.", f"{a} was tired now.", "The sun was going down.")
    tale.say(
        f"On the way home {a.he} met {b}, who had {NUMBERS[others]} in {an(theirs)}.",
        f'Then {b} came by with {an(theirs)} and said, "Look, I have {NUMBERS[others]}!"',
    )
    tale.say(
        "They walked home together.",
        f"{a} and {b} sang all the way home.",
        "They showed each other everything.",
    )
    tale.say(
        f"{a} ran into the kitchen.",
        f"{a.his} {relative} was already waiting for {a}.",
        f"{a} sat down to count.",
    )
    told = (first, later, others)
    return tale.end(
        tale.count_ending(
            first + later,
            told,
            f"{a} had _ {find} in all.",
            f"There were _ {find} in the {mine}.",
            f'"I found _ {find} for you!" said {a}.',
        ),
        Ending(
            color,
            other_color,
            f"{a} emptied the _ {bag} on the table.",
            f"{a}'s {relative} looked into the _ {bag} that {a} had brought.",
        ),
    )
