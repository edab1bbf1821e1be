"""Plots about what happens to children: an animal, two promises, a race, and bad weather."""

from qpruner.stories import vocabulary as words
from qpruner.stories.grammar import Ending, Story, Tale
from qpruner.stories.vocabulary import an


def found_animal(tale: Tale) -> Story:
    """An animal is found, fed at the second attempt, and named."""
    a = tale.people(1)[0]
    animal, other_animal = tale.draw_two(words.ANIMALS)
    fur, place = tale.draw(words.FUR), tale.draw(words.PLACES)
    food, other_food = tale.draw_two(words.FOODS)
    name, other_name = tale.draw_two(words.PET_NAMES)
    relative = tale.draw(words.RELATIVES)
    tale.say(
        f"{tale.pick(words.OPENINGS)} {a} was playing {place.at} when {a.he} heard a strange noise.",
        f"{tale.pick(words.OPENINGS)} {a} went to {place} and heard something cry.",
        f"{a} was on {a.his} way to {place} when something moved in the grass.",
    )
    tale.say(
        f"At first {a.he} thought it was {an(other_animal)}.",
        f'"Is that {an(other_animal)}?" {a.he} asked {a.his} {relative}.',
        f"It sounded a bit like {an(other_animal)}.",
    )
    tale.say(
        f"But it was a small {fur} {animal}, sitting {tale.pick(words.SPOTS)}.",
        f"But then {a.he} saw a little {fur} {animal} {tale.pick(words.SPOTS)}.",
    )
    tale.say(
        f"It was cold and hungry, so {a} carried it home.",
        f"It was all alone, and {a} took it home in {a.his} arms.",
        f"It shook with cold, so {a} put it under {a.his} coat and ran home.",
    )
    tale.say(
        f"{a.he} offered it some {other_food}, but it turned its head away.",
        f"It did not like the {other_food} that {a.he} put on a plate.",
        f"{a.he} tried {other_food} first, but it would not eat.",
    )
    tale.say(
        f"Then {a.he} tried {food}, and it ate every bit.",
        f"When {a.he} brought some {food}, it ate and ate.",
        f"In the end it was happy to eat some {food}.",
    )
    tale.say(
        f'"Call it {other_name}," said {a.his} {relative}.',
        f"{a.his} {relative} wanted to name it {other_name}.",
        f'"How about {other_name}?" asked {a.his} {relative}.',
    )
    tale.say(
        f'"No, its name is {name}," {a} answered.',
        f"But {a} liked {name} better, and so they called it that.",
        f'"{name} is a better name," said {a}.',
    )
    return tale.end(
        Ending(
            name,
            other_name,
            f"From that day on, _ slept next to {a.his} bed.",
            f'"Good night, _," {a} said that evening.',
            f"Soon _ came running whenever {a} called.",
        ),
        Ending(
            animal,
            other_animal,
            f"The little _ stayed with {a} for many years.",
            f"{name} was the best _ in the world.",
        ),
        Ending(
            food,
            other_food,
            f"Every morning {name} got a big plate of _.",
            f"And {name} never ate anything but _.",
        ),
    )


def promise(tale: Tale) -> Story:
    """Two promises for two days; one of the days comes, and something else would be more fun."""
    a, *friends = tale.people(3)
    favors = tale.draw_two(words.FAVORS)
    days = tale.draw_two(words.DAYS)
    outing, place = tale.draw(words.OUTINGS), tale.draw(words.PLACES)
    tale.say(
        f"{a} had promised to help {a.his} neighbors {friends[0]} and {friends[1]}.",
        f"{friends[0]} and {friends[1]} had a lot of work, and {a} wanted to help them.",
        f"{a} always kept {a.his} promises.",
    )
    tale.say(
        f'"On {days[0]} I will {favors[0]} for you," {a} told {friends[0]}.',
        f"On {days[0]} {a} wanted to {favors[0]} for {friends[0]}.",
        f"{a} gave {friends[0]} {a.his} word to {favors[0]} on {days[0]}.",
    )
    tale.say(
        f"{friends[1]} asked {a.him} to {favors[1]} on {days[1]}, and {a.he} agreed.",
        f"And on {days[1]} {a.he} wanted to {favors[1]} for {friends[1]}.",
        f'"And I will {favors[1]} for you on {days[1]}," {a.he} said to {friends[1]}.',
    )
    tale.say(
        f"{a} wrote it all down on a piece of paper.",
        f"{a} said it over and over so that {a.he} would not forget.",
        "There was much to do that week.",
    )
    promises = list(zip(friends, favors, days, strict=True))
    (friend, favor, day), (other_friend, other_favor, _) = tale.shuffled(promises)
    tale.say(
        f"When {day} came, the sun was shining.",
        f"Then it was {day}.",
        f"{day} was the best day of the whole week.",
    )
    tale.say(
        f"All the other children went to {place} to {outing}.",
        f'"Come with us to {place}!" the other children called. "We want to {outing}!"',
        f"The other children wanted to {outing} {place.at}.",
    )
    tale.say(
        f'"I would love to," said {a}, "but I have made a promise."',
        f"{a} was sad for a moment, but a promise is a promise.",
        f'"Not today," said {a}, "for somebody is waiting for me."',
    )
    return tale.end(
        Ending(
            friend,
            other_friend,
            f"So {a} went to _ and worked until it was dark.",
            f'"Thank you, {a}," said _ that evening.',
        ),
        Ending(
            favor.done,
            other_favor.done,
            f"So {a} stayed and _.",
            f"And while the others had fun, {a} _.",
            f"That day {a} _ for {friend}.",
        ),
    )


def race(tale: Tale) -> Story:
    """Three run a race, and the order changes before the end."""
    first, second, third = tale.people(3)
    start, goal = tale.draw_two(words.PLACES)
    prize, second_prize = tale.things(2)
    runners = tale.shuffled((first, second, third))
    tale.say(
        f"{runners[0]}, {runners[1]} and {runners[2]} wanted to know who was the fastest.",
        f"There was a race for {runners[0]}, {runners[1]} and {runners[2]}.",
        f'"I am the fastest!" said {runners[0]}, but {runners[1]} and {runners[2]} did not agree.',
    )
    tale.say(
        f"They had to run from {start} to {goal}.",
        f"The race began {start.at} and ended {goal.at}.",
        f"From {start} they wanted to run all the way to {goal}.",
    )
    tale.say(
        f"The winner would get {an(prize)}, and the second prize was {an(second_prize)}.",
        f"There was {an(prize)} for the winner and {an(second_prize)} for the second.",
        f"The first prize was {an(prize)}, and the second would get {an(second_prize)}.",
    )
    tale.say('"Ready, steady, go!"', "A bell rang, and off they went.", "Then they began to run.")
    tale.say(
        f"{second} was in front at first.",
        f"At first {second} was the fastest.",
        f"{second} started well and left the others behind.",
    )
    tale.say(
        f"{third} stepped on a stone and lost a shoe.",
        f"{third} fell into the mud and had to get up again.",
        f"{third} took the wrong path and had to turn around.",
    )
    tale.say(
        f"Halfway to the end, {first} came closer and closer.",
        f"{first} ran faster and faster.",
        f"But {first} did not give up.",
    )
    tale.say(
        f"Just before the end, {first} passed {second}.",
        f"With a last big jump {first} got past {second}.",
        f"{first} flew past {second} at the last tree.",
    )
    tale.say("Everybody clapped.", "What a race that was!", "The people shouted and waved.")
    return tale.end(
        Ending(first, second, f"The {prize} went to _.", "The winner was _!", f"_ held up the {prize}."),
        Ending(second, first, f"The {second_prize} went to _.", f"And _ was happy with the {second_prize}."),
        Ending(third, second, "The last one was _, who laughed about it.", f"Only _ got no prize {goal.at}."),
        Ending(prize, second_prize, f"{first} was happy to get the _."),
        Ending(second_prize, prize, f"{second} was happy to get the _."),
        Ending(goal.at, start.at, "They all sat down to rest _.", "In the end they all arrived _."),
    )


def spoiled_day(tale: Tale) -> Story:
    """Bad weather spoils a day outside, and the day is saved inside."""
    a, b = tale.friends()
    weather, other_weather = tale.draw_two(words.WEATHERS)
    outing, pastime = tale.draw(words.OUTINGS), tale.draw(words.PASTIMES)
    place, day = tale.draw(words.PLACES), tale.draw(words.DAYS)
    thing = tale.things(1)[0]
    snack, other_snack = tale.draw_two(words.SNACKS)
    relative = tale.draw(words.RELATIVES)
    tale.say(
        f"On {day} {a} and {b} went to {place} to {outing}.",
        f'"Let us go to {place} on {day} and {outing}," {a} said to {a.his} friend {b}.',
        f"It was {day}, and {a} and {b} wanted to {outing} {place.at}.",
    )
    tale.say(
        f"{a} took {an(thing)} and some {snack} along, and {b} had some {other_snack}.",
        f"{b} brought some {other_snack}, and {a} brought {an(thing)} and some {snack}.",
    )
    tale.say(
        f"The day before there had been {other_weather}, but now the sky was blue.",
        f'"I am glad that the {other_weather} is over," said {b}.',
        f"All week long there had been {other_weather}, but now it was over.",
    )
    tale.say(
        f"They had just begun when {weather.came}.",
        f"All at once {weather.came}.",
        f"A little later {weather.came}.",
    )
    tale.say(
        f"Soon the {thing} {weather.effect}.",
        f"In no time the {thing} {weather.effect}.",
        f"The {thing} {weather.effect}, and {a} was upset.",
    )
    tale.say(
        f"They ran home to {a}'s {relative} as fast as they could.",
        f'"Quick!" cried {a}, and they ran home, where {a.his} {relative} opened the door.',
        f"Luckily {a}'s {relative} came and took them home.",
    )
    tale.say(
        f"There they sat down by the window to {pastime}.",
        f'"We can {pastime} here," said {b}, and that was fun, too.',
        f"Inside it was nice and quiet, and they began to {pastime}.",
    )
    tale.maybe("They soon felt better.", "They laughed a lot.", f"{a} was not sad any more.")
    return tale.end(
        Ending(
            weather,
            other_weather,
            f"Because of the _, they could not {outing} any more.",
            f"When the _ was over, {b} went home.",
        ),
        Ending(outing, pastime, "One day they would try again to _.", f'"But I still want to _," said {a}.'),
        Ending(snack, other_snack, f"And {a} shared the _ with everybody.", f"Then {a} took out the _."),
        Ending(other_snack, snack, f"And {b} shared the _ with everybody.", f"Then {b} took out the _."),
    )
