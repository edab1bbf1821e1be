"""Plots about things: lost, swapped, hidden and repaired."""

from qpruner.stories import vocabulary as words
from qpruner.stories.grammar import Ending, Story, Tale
from qpruner.stories.vocabulary import an


def lost_thing(tale: Tale) -> Story:
    """A thing is lost at one of two places, and a friend finds it."""
    a, b = tale.friends()
    mine, theirs = tale.things(2)
    place, stop = tale.draw_two(words.PLACES)
    relative = tale.draw(words.RELATIVES)
    tale.say(
        f"{a} loved the {mine} that {a.his} {relative} had given {a.him}.",
        f"For {a.his} birthday, {a} got {an(mine)} from {a.his} {relative}.",
        f"{a} had {an(mine)}, a present from {a.his} {relative}.",
    )
    tale.say(
        f"{tale.pick(words.OPENINGS)} {a} took it to {place} and met {a.his} friend {b} there.",
        f"{tale.pick(words.OPENINGS)} {a} and {a.his} friend {b} went to {place} to play with it.",
    )
    tale.say(
        f"{b} had brought {an(theirs)}, and they played for hours.",
        f"{b} came with {an(theirs)}, and the time went by quickly.",
        f"{b} showed {a} {an(theirs)}, and they had a lot of fun.",
    )
    tale.say(
        f"On the way home they rested {stop.at} for a while.",
        f"Later they also stopped {stop.at} to drink some water.",
        f"On the way back they spent a little time {stop.at}.",
    )
    tale.say(
        f"When {a} came home, the {mine} was gone.",
        f"At home {a} looked into {a.his} bag, but the {mine} was not there.",
        f"That evening {a} could not find the {mine} anywhere.",
    )
    tale.maybe(
        f'"What will my {relative} say?" {a.he} cried.',
        f'"I must have dropped it," {a.he} told {b}.',
        f"{a.he} was so sad that {a.he} could not eat.",
    )
    tale.say(
        f"{a} searched {stop.at}, but found nothing.",
        f"First {a} went back to {stop}, but it was not there.",
        f"{a} looked for it {stop.at}, but had no luck.",
    )
    spot = tale.pick(words.SPOTS)
    tale.say(
        f"Then {b} went to look {place.at} and saw something {mine.color} {spot}.",
        f"Meanwhile {b} ran to {place} and saw something {mine.color} {spot}.",
        f"But {b} had a look {place.at} and noticed something {mine.color} {spot}.",
    )
    return tale.end(
        Ending(mine.noun, theirs.noun, f"It was {a}'s _!", f"It was the _ that {a} had lost!"),
        Ending(
            b,
            a,
            f"Without _, the {mine} would have been lost forever.",
            f"It was _ who had found the {mine}, and both of them were happy.",
        ),
        Ending(b.he, a.he, f"{b} was proud that _ had found the {mine}."),
        Ending(
            place.at,
            stop.at,
            f'"Your {mine.noun} was _ all the time," said {b}.',
            f"So {a} had lost the {mine} _.",
        ),
    )


def swap(tale: Tale) -> Story:
    """Two friends swap their things."""
    a, b = tale.friends()
    mine, theirs = tale.things(2)
    place = tale.draw(words.PLACES)
    relative = tale.draw(words.RELATIVES)
    tale.say(
        f"{a} owned {an(mine)} that once belonged to {a.his} {relative}.",
        f"{a} had {an(mine)} from {a.his} {relative}.",
        f"{a}'s {relative} had made {an(mine)} for {a.him}.",
    )
    tale.say(
        f"{a.his} friend {b} had {an(theirs)}.",
        f"{b}, who lived next door, had {an(theirs)}.",
        f"{b}, {a.his} best friend, owned {an(theirs)}.",
    )
    tale.say(
        f"{tale.pick(words.OPENINGS)} they met {place.at}.",
        f"{tale.pick(words.OPENINGS)} the friends went to {place} together.",
        f"They often played together {place.at}.",
    )
    tale.say(
        f'"I wish I had your {theirs.noun}," said {a}.',
        f'"What a lovely {theirs.noun} you have," said {a}.',
        f"{a} could not stop looking at the {theirs.noun}.",
    )
    tale.say(
        f'"And I have always liked your {mine.noun}," said {b}.',
        f"{b}, too, had always wanted {an(mine.noun)}.",
        f'"I like your {mine.noun} much better," said {b}.',
    )
    tale.maybe(
        f"{a} thought about it for a long time.",
        f"For a moment {b} was not sure.",
        "They sat down and talked about it.",
    )
    tale.say(
        '"Then let us swap!" they said at the same time.',
        "So they agreed to swap.",
        f'"Shall we trade?" asked {tale.pick((a, b))}, and that is what they did.',
    )
    tale.say(
        "They shook hands and went home.",
        "Then they said goodbye and walked home.",
        "Both were happy with the trade.",
    )
    return tale.end(
        Ending(theirs, mine, f"That night {a} put the _ next to {a.his} bed.", f"Now the _ belonged to {a}."),
        Ending(mine, theirs, f"At home {b} showed everybody the _.", f"From then on {b} kept the _."),
        Ending(
            a.he,
            b.he,
            f"{a} was so glad that _ sang all evening.",
            f"{a} ran so fast with the {theirs.noun} that _ almost fell.",
        ),
    )


def hidden_things(tale: Tale) -> Story:
    """Two things are hidden in two containers, and only a friend remembers where."""
    a, b = tale.friends()
    things = tale.things(2)
    boxes = tale.draw_two(words.CONTAINERS)
    (wanted, box), (unwanted, other_box) = tale.shuffled(list(zip(things, boxes, strict=True)))
    rascal = tale.pick(("little brother", "little sister", "baby cousin"))
    tale.say(
        f"{a} owned {an(things[0])} and {an(things[1])}.",
        f"{a} liked nothing better than {a.his} {things[0]} and {a.his} {things[1]}.",
        f"{a} had got {an(things[0])} and {an(things[1])} for {a.his} birthday.",
    )
    tale.say(
        f"But {a.his} {rascal} broke everything, so {a} had to hide them.",
        f"{a.his} {rascal} was coming to visit, so {a.he} looked for a safe place.",
        f'"My {rascal} must not find them," {a.he} thought.',
    )
    tale.say(
        f"{a.he} hid the {things[0]} in the {boxes[0]} and the {things[1]} in the {boxes[1]}.",
        f"{a} put the {things[0]} into the {boxes[0]}, and the {things[1]} went into the {boxes[1]}.",
        f"The {things[0]} went into the {boxes[0]}, and the {boxes[1]} was just right for the {things[1]}.",
    )
    tale.say(
        f"Only {b} saw what {a} did.",
        f"{a.his} friend {b} watched and promised to tell nobody.",
        f"{b} was the only one who knew about it.",
    )
    tale.say(
        "Many days went by.",
        "The summer came and went.",
        f"For weeks {a} was busy with other things.",
        "Then everybody was busy for a long time.",
    )
    tale.say(
        f"{tale.pick(words.OPENINGS)} {a} wanted to have the {wanted.noun} back.",
        f"{tale.pick(words.OPENINGS)} {a} needed the {wanted.noun} again.",
        f"{tale.pick(words.OPENINGS)} {a} thought of the {wanted.noun} again.",
    )
    tale.say(
        f'"I have forgotten where it is," {a.he} told {b}.',
        f"But {a.he} could not remember the hiding place.",
        f'"Where did I put it?" {a.he} asked {b}.',
    )
    tale.say(f'"I still know," said {b}.', f"{b} smiled and took {a} by the hand.", f"{b} only laughed.")
    return tale.end(
        Ending(
            box,
            other_box,
            f"{b} went straight to the _ and took out the {wanted}.",
            f"The {wanted} was still in the _.",
            f'"You put the {wanted.noun} in the _," {b} said.',
        ),
        Ending(
            other_box,
            box,
            f"They found it at once, and only the {unwanted} stayed in the _.",
            f"{a} took it out, but left the {unwanted} in the _.",
        ),
    )


def repair(tale: Tale) -> Story:
    """A broken thing is mended at the second attempt."""
    a = tale.people(1)[0]
    fragile, color = tale.draw(words.FRAGILE), tale.draw(words.COLORS)
    thing, part = f"{color} {fragile}", fragile.part
    culprit, witness = tale.draw_two(words.ANIMALS)
    relative, job = tale.draw(words.RELATIVES), tale.draw(words.JOBS)
    good, bad = tale.draw_two(words.MATERIALS)
    tale.say(
        f"{a} had {an(thing)} and was very proud of it.",
        f"{a} loved {a.his} {thing} more than anything else.",
        f"{tale.pick(words.OPENINGS)} {a} left {a.his} {thing} outside.",
    )
    tale.say(
        f"Then {an(culprit)} came running and knocked it over, while {an(witness)} watched from the gate.",
        f"But {an(culprit)} ran after {an(witness)} and fell right onto the {fragile}.",
        f"{an(witness)} only walked around it, but {an(culprit)} jumped on top of it.",
    )
    tale.say(f"Crack! The {part} broke off.", f"There was a loud crack, and off came the {part}.")
    tale.maybe(f"{a} cried and cried.", f'"Oh no!" {a} shouted.', f"{a} picked up the pieces.")
    tale.say(
        f"{a.his} {relative} tried to mend it with {bad}, but that did not hold.",
        f'"{bad.capitalize()} will do," said {a.his} {relative}, but soon it broke again.',
        f"First {a.his} {relative} used {bad}, but it came off the same day.",
    )
    tale.say(
        f"So {a} took the {fragile} to the {job}.",
        f"The next day {a} asked the {job} for help.",
        f'"Ask the {job}," a friend told {a}, and that was a good idea.',
    )
    tale.say(
        f"The {job} looked at the {part} and came back with {good}.",
        f'"We need {good}," said the {job} and went to work.',
        f"The {job} thought for a moment and used {good}.",
    )
    tale.say("It took all afternoon.", "The work was done before dark.", f"{a} watched every step.")
    return tale.end(
        Ending(
            good,
            bad,
            f"Thanks to the _, the {fragile} was as good as new.",
            f"Held by the _, the {part} never came off again.",
        ),
        Ending(
            culprit,
            witness,
            f"After that, {a} kept the {fragile} away from the _.",
            f'"Just keep it away from that _," said the {job}.',
        ),
    )
