"""Plots about gifts: bought, brought from a journey, brought to a party, and baked."""

from qpruner.stories import vocabulary as words
from qpruner.stories.grammar import Ending, Story, Tale
from qpruner.stories.vocabulary import an


def present(tale: Tale) -> Story:
    """A present is bought from saved coins, and some coins are left."""
    a = tale.people(1)[0]
    thing, too_dear = tale.things(2)
    relative, helper = tale.draw_two(words.RELATIVES)
    shop = tale.draw(words.SHOPS)
    coins = tale.number(5, 12)
    price = tale.number(2, coins - 2)
    tale.say(
        f"{a} had saved {words.NUMBERS[coins]} coins to buy a present for {a.his} {relative}.",
        f"The birthday of {a}'s {relative} was near, and {a} had {words.NUMBERS[coins]} coins for a present.",
        f"{a} wanted to buy something for {a.his} {relative} and took {words.NUMBERS[coins]} coins along.",
    )
    tale.say(f"{a.he} went to {shop} to find something nice.", f"So {a.he} walked to {shop}.")
    nouns = tale.shuffled((thing.noun.plural, too_dear.noun.plural))
    tale.say(
        f"There were {nouns[0]} and {nouns[1]} in many colors.",
        f"It was full of {nouns[0]} and {nouns[1]}.",
        f"There {a.he} saw {nouns[0]}, {nouns[1]} and many other things.",
    )
    tale.say(
        f"{an(too_dear)} was very pretty, but it cost too much.",
        f"{a} looked at {an(too_dear)} first, but it was too expensive.",
        f'"I cannot pay for the {too_dear}," {a} thought.',
    )
    tale.say(
        f"Then {a} found {an(thing)} for {words.NUMBERS[price]} coins and bought it.",
        f"{an(thing)} was only {words.NUMBERS[price]} coins, so {a} took it.",
        f"In the end {a.he} paid {words.NUMBERS[price]} coins for {an(thing)}.",
    )
    tale.say(
        f"At home {a.his} {helper} helped {a.him} to wrap it.",
        f"{a.his} {helper} lent {a.him} some paper to wrap it in.",
        f"{a.he} hid it under {a.his} bed, and only {a.his} {helper} knew about it.",
    )
    tale.say(
        f"On the day of the birthday {a} got up early.",
        f"{a} could hardly wait.",
        "At last the great day came.",
    )
    return tale.end(
        Ending(
            thing,
            too_dear,
            f"{a}'s {relative} opened the paper and found the _.",
            f'"What a beautiful _!" cried {a}\'s {relative}.',
        ),
        Ending(
            relative,
            helper,
            f"{a}'s _ loved the {thing}.",
            f'"The {thing.noun} is just what I wanted," said {a}\'s _.',
        ),
        tale.count_ending(
            coins - price,
            (coins, price),
            f"And {a} still had _ coins in {a.his} pocket.",
            f"With the _ coins that were left, {a} bought some candy.",
        ),
    )


def trip(tale: Tale) -> Story:
    """A journey to two places, with something from each of them for someone at home."""
    a, b, c = tale.people(3)
    first, second = tale.things(2)
    place, last_place = tale.draw_two(words.PLACES)
    there, back = tale.draw_two(words.VEHICLES)
    tale.say(
        f"In the summer {a} went on a trip by {there}.",
        f"{a} had a week off and traveled far away by {there}.",
        f"{a} went on a long journey by {there}.",
    )
    tale.say(
        f"First {a.he} came to {place} and found {an(first)} there.",
        f"{a.he} spent a sunny day {place.at} and got {an(first)} there.",
        f"{a.his} first stop was {place}, where {a.he} bought {an(first)}.",
    )
    tale.say(
        f"Then {a.he} went on to {last_place} and bought {an(second)}.",
        f"After that {a.he} visited {last_place}, where {a.he} found {an(second)}.",
        f"The next day {a.he} got {an(second)} {last_place.at}.",
    )
    tale.say(
        f'"The {first.noun} is for {b}, and the {second.noun} is for {c}," {a.he} thought.',
        f"{a.he} wanted to give the {first.noun} to {b} and the {second.noun} to {c}.",
        f"The {first.noun} was meant for {b}, and the {second.noun} was meant for {c}.",
    )
    tale.say(
        f"At the end of the week {a.he} came home by {back}.",
        f"The way home by {back} was long.",
        f"Tired but happy, {a.he} took the {back} home.",
    )
    tale.say(
        f"{b} and {c} were waiting at the door.",
        f"{c} and {b} came to visit the next day.",
        f"{b} and {c} wanted to hear all about it.",
    )
    tale.maybe(f'"I have something for you," said {a}.', f"{a} opened {a.his} bag with a smile.")
    gifts = ((b, first, place), (c, second, last_place))
    (friend, gift, origin), (_, other_gift, other_origin) = tale.shuffled(gifts)
    return tale.end(
        Ending(gift, other_gift, f"{friend} got the _ and was very happy.", f"{a} gave the _ to {friend}."),
        Ending(
            origin,
            other_origin,
            f'"Your {gift.noun} comes from _," {a} told {friend}.',
            f"{a} held up the {gift} and talked about _.",
        ),
        Ending(
            back,
            there,
            f'"The best part was coming home by _," said {a}.',
            f"{a} could still hear the noise of the _ that had brought {a.him} home.",
        ),
    )


def party(tale: Tale) -> Story:
    """Three guests bring three presents."""
    a, *guests = tale.people(4)
    gifts = tale.things(3)
    cake = tale.draw(words.CAKES)
    tale.say(
        f"It was {a}'s birthday, and {a.he} had asked three friends to come.",
        f"{a} had a birthday party.",
        f"On {a.his} birthday {a} was up before the sun.",
    )
    tale.say(
        f"{guests[0]} came first and brought {an(gifts[0])}.",
        f"The first guest was {guests[0]}, who had {an(gifts[0])} for {a}.",
    )
    tale.say(
        f"Then {guests[1]} knocked at the door with {an(gifts[1])}.",
        f"{guests[1]} came next and gave {a} {an(gifts[1])}.",
    )
    tale.say(
        f"The last one was {guests[2]}, whose present was {an(gifts[2])}.",
        f"{guests[2]} was late, but had {an(gifts[2])} for {a}.",
    )
    tale.say(
        f"They all sat down and ate {an(cake)}.",
        f"There was {an(cake)}, and everybody took a big piece.",
        f"{a} blew out the candles, and they shared {an(cake)}.",
    )
    tale.say(
        "After that they played games until it got dark.",
        "They danced, sang and laughed all afternoon.",
        "Then they played hide and seek in the yard.",
    )
    tale.say(
        "In the evening everybody went home.",
        f"When the party was over, {a} was very tired.",
        f"At night {a} looked at {a.his} presents again.",
    )
    (guest, gift), (other, other_gift), _ = tale.shuffled(list(zip(guests, gifts, strict=True)))
    return tale.end(
        Ending(
            gift.noun,
            other_gift.noun,
            f"{a} liked the _ from {guest} best of all.",
            f"{a} wrote a letter to {guest} to say thank you for the _.",
        ),
        Ending(
            guest,
            other,
            f'"Thank you for the {gift.noun}, _," {a} wrote the next day.',
            f"{a} fell asleep next to the {gift} from _.",
        ),
    )


def baking(tale: Tale) -> Story:
    """A cake is baked after a missing ingredient has been borrowed."""
    a, b = tale.friends()
    cake, other_cake = tale.draw_two(words.CAKES)
    missing, plenty = tale.draw_two(words.INGREDIENTS)
    relative, job = tale.draw(words.RELATIVES), tale.draw(words.JOBS)
    tale.say(
        f"{a} and {b} wanted to bake something for {a}'s {relative}.",
        f"It was the birthday of {a}'s {relative}, so {a} and {b} met in the kitchen.",
        f'"Let us surprise my {relative}," {a} said to {a.his} friend {b}.',
    )
    tale.say(
        f"{b} thought of {an(other_cake)}, but {a} wanted to make {an(cake)}.",
        f'"Not {an(other_cake)} again," said {a}, "I would like to make {an(cake)}."',
        f"They could not make {an(other_cake)}, so they chose {an(cake)}.",
    )
    tale.say(
        f"There was enough {plenty}, but there was no {missing}.",
        f"They found a lot of {plenty} in the cupboard, but no {missing}.",
        f'"We have {plenty}, but where is the {missing}?" asked {a}.',
    )
    tale.say(
        f"So {b} ran to the {job}, who was happy to help.",
        f"{b} put on {b.his} shoes and went to ask the {job}.",
        f'"The {job} will have some," said {b} and ran off.',
    )
    tale.say(
        f"A little later {b.he} came back with a full bag.",
        f"Soon {b.he} was back, and they could begin.",
        f"{a} cleaned the table until {b.he} came back.",
    )
    tale.say(
        f"{a} stirred, and {b} kept an eye on the oven.",
        f"{b} mixed everything, and {a} put it into the oven.",
        "They stirred and tasted and laughed a lot.",
    )
    tale.say(
        "Soon the whole house smelled sweet.",
        "It came out of the oven warm and golden.",
        "Then they had to wait.",
    )
    return tale.end(
        Ending(
            cake,
            other_cake,
            f'"This is the best _ I have ever eaten," said {a}\'s {relative}.',
            f"{a}'s {relative} ate three pieces of the _.",
        ),
        Ending(
            missing,
            plenty,
            f"Without the _ from the {job}, they could not have done it.",
            f"They took the {job} a big piece to say thank you for the _.",
        ),
        Ending(
            b,
            a,
            f'"And thank you, _, for running to the {job}," said {a}\'s {relative}.',
            f"The first piece was for _, who had run to the {job}.",
        ),
    )
