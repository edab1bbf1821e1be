"""The words of the stories.

Every list is long enough that a reader who lost track of the story cannot guess the word again. Lists that
occur in the same story share no word, and no word starts with a vowel letter that is spoken as a consonant
(`uniform`) or the other way round (`hour`), so that `an` can go by the first letter.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Person:
    """A named child with the pronouns that belong to the name."""

    name: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Noun:
    """A countable noun."""

    singular: str
    plural: str

    def __str__(self) -> str:
        return self.singular


@dataclass(frozen=True)
class Thing:
    """A noun with the color by which a story tells it from others."""

    color: str
    noun: Noun

    def __str__(self) -> str:
        return f"{self.color} {self.noun}"


@dataclass(frozen=True)
class Place:
    """A place to go to (`name`) and to be at (`at`)."""

    name: str
    at: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Deed:
    """Something to do: `paint the fence`, `painted the fence`."""

    do: str
    done: str

    def __str__(self) -> str:
        return self.do


@dataclass(frozen=True)
class Weather:
    """Weather that spoils a day: its name, how it came, and what it did to a thing that lay outside."""

    name: str
    came: str
    effect: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fragile:
    """A thing and the part of it that breaks off."""

    noun: str
    part: str

    def __str__(self) -> str:
        return self.noun


def an(phrase: object) -> str:
    """The phrase with its indefinite article."""
    words = str(phrase)
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _words(words: str) -> tuple[str, ...]:
    return tuple(words.split())


def _phrases(phrases: str) -> tuple[str, ...]:
    return tuple(phrases.split(", "))


def _nouns(words: str) -> tuple[Noun, ...]:
    # An irregular plural follows its singular after a slash.
    pairs = (word.partition("/") for word in words.split())
    return tuple(Noun(singular, plural or f"{singular}s") for singular, _, plural in pairs)


def _places(preposition: str, names: str) -> tuple[Place, ...]:
    return tuple(Place(f"the {name}", f"{preposition} the {name}") for name in _phrases(names))


def _deeds(pairs: str) -> tuple[Deed, ...]:
    return tuple(Deed(*pair.split("/")) for pair in _phrases(pairs))


GIRLS = tuple(
    Person(name, "she", "her", "her")
    for name in _words(
        "Mia Anna Lily Rosa Clara Nora Emma Zoe Ruby Ella Maya Sara Lucy Nina Ivy Hazel Alice Molly Julia "
        "Eva Tara Holly Greta Amy"
    )
)
BOYS = tuple(
    Person(name, "he", "him", "his")
    for name in _words(
        "Tom Ben Max Leo Sam Jack Noah Finn Oscar Henry Paul Peter Adam Owen Theo Hugo Felix Daniel David "
        "Simon Oliver Martin Victor Luke"
    )
)
PEOPLE = GIRLS + BOYS
RELATIVES = _words("mother father grandmother grandfather aunt uncle cousin sister brother")
JOBS = _words(
    "baker farmer miller gardener doctor painter sailor tailor carpenter teacher shepherd pilot blacksmith "
    "postman fisherman cook"
)

COLORS = _words("red blue green yellow orange purple pink white black brown gray silver golden")
THINGS = _nouns(
    "ball kite doll drum book cup hat scarf/scarves whistle bell lamp comb brush/brushes ribbon ring spoon "
    "boat train truck puppet robot spade purse umbrella apron mitten glove blanket pillow flute puzzle "
    "balloon lantern mug bracelet necklace mask crown eraser album jacket sweater trumpet violin teapot "
    "notebook paintbrush/paintbrushes cushion envelope watch/watches"
)
FINDS = _words(
    "marbles shells pebbles feathers acorns nuts walnuts plums cherries berries pinecones coins buttons "
    "apples pears beans lemons grapes"
)
TREASURES = FINDS + _words("stickers beads stamps cards pencils crayons peaches cookies candies tickets")
CROPS = _words(
    "cabbages carrots pumpkins onions tulips roses sunflowers turnips melons leeks beets radishes potatoes "
    "tomatoes daisies"
)
FRAGILE = tuple(
    Fragile(*pair.split())
    for pair in _phrases(
        "wagon wheel, kite tail, clock hand, doll arm, boat mast, lamp shade, umbrella handle, chair leg, "
        "table leg, scooter wheel, teapot lid, airplane wing, sled seat, robot arm, truck wheel"
    )
)
CONTAINERS = _words(
    "chest cupboard trunk crate barrel wardrobe suitcase sack closet hamper locker cabinet basket shed "
    "garage toolbox cellar"
)
BAGS = _words("bag basket bucket box")

PLACES = (
    *_places("in", "park, forest, garden, meadow, orchard, castle, village square, schoolyard, valley"),
    *_places("at", "beach, market, station, playground, zoo, harbor, lighthouse, campsite, fairground"),
    *_places("by", "lake, river, pond, old mill, fountain, waterfall"),
    *_places("on", "farm, hill, island"),
)
SPOTS = _phrases(
    "under a bench, behind a bush, under a tree, next to a big stone, beside the path, in the tall grass, "
    "between two rocks, behind an old wall, under some leaves"
)
SHOPS = _phrases(
    "the market, the fair, the toy shop, the corner shop, the big store, the craft shop, the gift shop, "
    "the old shop by the bridge"
)
VEHICLES = _phrases("bus, ship, plane, tram, horse cart, bicycle, ferry, taxi")

ANIMALS = _words(
    "kitten puppy rabbit duck hedgehog squirrel turtle frog owl goat lamb mouse parrot fox hen pony crow "
    "otter raccoon goose"
)
FUR = _words("brown gray black white golden spotted")
PET_NAMES = _words(
    "Biscuit Pepper Nutmeg Shadow Pickle Lucky Dusty Sunny Cocoa Ginger Waffle Peanut Pudding Clover Patch "
    "Bandit Toffee Mango Rocket Teddy"
)
FOODS = _words("bread cheese oats berries seeds nuts carrots corn peas rice lettuce grapes")

CAKES = _phrases(
    "apple pie, carrot cake, lemon cake, plum pie, honey cake, cherry pie, almond cake, ginger cake, "
    "chocolate cake, pumpkin pie, banana cake, berry pie, walnut cake, peach pie"
)
INGREDIENTS = _words("flour sugar butter milk cream salt cinnamon vanilla yeast oil")
SNACKS = _words(
    "sandwiches muffins pancakes grapes cookies pretzels popcorn cheese oranges pears strawberries nuts figs"
)
MATERIALS = _words("glue tape wire string nails thread rope screws wax clay")

DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WEATHERS = (
    Weather("rain", "heavy rain began to fall", "was soaking wet"),
    Weather("wind", "a strong wind began to blow", "was blown into a tree"),
    Weather("snow", "thick snow began to fall", "was buried in white"),
    Weather("fog", "a thick fog came up", "could not be seen any more"),
    Weather("hail", "hail began to rattle down", "was full of dents"),
    Weather("thunder", "loud thunder began to roll", "was forgotten on the ground"),
    Weather("heat", "a terrible heat set in", "was too hot to touch"),
    Weather("frost", "a bitter frost set in", "was frozen stiff"),
)
OUTINGS = _phrases(
    "fly a kite, have a picnic, play football, ride bikes, build a tent, watch the birds, "
    "paint a picture, look for bugs, pick flowers, climb trees, make a fire, catch butterflies"
)
PASTIMES = _phrases(
    "play cards, read stories, sing songs, build a tower, draw monsters, make paper boats, tell jokes, "
    "knit socks, play chess, dance, bake cookies, write letters"
)
FAVORS = _deeds(
    "paint the fence/painted the fence, water the plants/watered the plants, feed the hens/fed the hens, "
    "carry the wood/carried the wood, clean the cellar/cleaned the cellar, wash the car/washed the car, "
    "pick the plums/picked the plums, sweep the barn/swept the barn, walk the dog/walked the dog, "
    "mend the net/mended the net, dig the garden/dug the garden, bake the bread/baked the bread, "
    "fix the roof/fixed the roof, fold the laundry/folded the laundry"
)

NUMBERS = _words("zero one two three four five six seven eight nine ten eleven twelve")
OPENINGS = _phrases(
    "One morning, One bright morning, One afternoon, One warm day, One day, Early one morning, One windy day"
)
