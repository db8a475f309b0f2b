"""Word lists and filler prose of the demo corpus, generated from a small grammar.

The demo tokenizer knows nearly all of these words as one token, so a sentence costs about eleven tokens. Every
function takes the random generator it draws from; nothing here has state.
"""

from collections.abc import Sequence
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Mara Anton Lena Oskar Priya Hugo Selma Tomas Nadia Viktor Ingrid Pablo Yuki Amara Felix Greta Ivan Jana Kofi Lars "
    "Mina Nils Olga Petra Quentin Rosa Stefan Tara Ulf Vera Wanda Xavier Yara Zeno Alma Boris Clara Dario Elena Farid "
    "Gina Henrik Irma Jonas Karla Leon Maya Noor Otto Paula Rafael Sonja Timo Uma Valter Wilma Arno Bruna Cyril Dora "
    "Emil Flora Gustav Hana Igor Jasmin Kurt Lidia Milan Nora Orla Pavel Rita Sven Thea Ugo Vilma Wim Zora Agnes "
    "Bertil Celia Dmitri Edith Fritz Gloria Harald Iris Joel Katrin Ludo Mirja Nestor"
)
LAST_NAMES = _words(
    "Ilves Tamm Novak Lindgren Okafor Haas Moreau Silva Tanaka Petrov Olsen Brandt Kovacs Weber Rossi Nyman Dahl "
    "Castro Ibarra Vogel Sato Keller Marin Horvat Laine Berger Fischer Romero Aalto Popov Wagner Costa Duarte Ekman "
    "Farkas Garcia Hansen Ivanov Jensen Klein Lopez Meyer Nilsson Orlov Pereira Ricci Schulz Torres Ueda Varga Winter "
    "Young Zhang Adler Becker Conti Drake Eliot Fuchs Grant Huber Irving Jarvis Kraus Lund Mendez Navarro Ortega "
    "Palmer Quist Reyes Santos Thorne Urban Vidal Walsh Xu Yilmaz Ziegler Ashby Bloom Carver Dunn Egan Frost Gale "
    "Holt Ivers Joyce Knox Lowe Marsh"
)
PLACE_NAMES = _words(
    "Harbor Maple River Summit Granite Willow Falcon Cedar Amber Copper Silver Northern Southern Eastern Western "
    "Crystal Meadow Raven Juniper Orchard Quarry Beacon Canyon Lagoon Glacier Prairie Thunder Velvet Ivory Scarlet "
    "Cobalt Saffron Birch Aspen Hazel Laurel Heron Osprey Badger Otter Bison Cypress Dolphin Ember Fern Garnet Hollow "
    "Indigo Jasper Kestrel Lantern Mason Nectar Onyx Pebble Quartz Ridge Sable Timber Umber Valley Walnut Yarrow "
    "Zephyr Anchor Bramble Clover Driftwood Elm Foxglove Gravel Heather Island Jubilee Keystone Linden Marble "
    "Nightingale Opal Pine Quill Rosewood Spruce Thistle Union Violet Windmill"
)
PLACE_KINDS = _words(
    "station depot warehouse museum library clinic office factory school hotel bridge tower bakery garden theater "
    "laboratory archive farm mill gallery"
)
CITIES = _words(
    "Lisbon Tartu Oslo Vienna Prague Madrid Dublin Warsaw Athens Turin Geneva Bergen Krakow Seville Lyon Ghent Bremen "
    "Malmo Riga Vilnius Porto Naples Zagreb Bilbao Leeds Boston Denver Austin Quito Lima Havana Cairo Tunis Dakar "
    "Accra Lagos Nairobi Delhi Mumbai Hanoi Seoul Osaka Kyoto Sydney Perth Hobart Bogota Manila Jakarta Tehran"
)
MONTHS = _words("January February March April May June July August September October November December")
COLORS = _words("red blue green yellow orange purple white black brown gray pink golden")
ANIMALS = _words("cat dog horse parrot rabbit turtle goat sheep fox owl duck lizard hamster snake pony frog")
FOODS = _words(
    "apples bread cheese coffee honey olives pepper rice salt sugar tea wheat barley grapes lemons almonds butter "
    "carrots onions peaches"
)
JOBS = _words(
    "baker pilot nurse lawyer farmer teacher painter miner sailor tailor plumber chemist surgeon editor printer welder "
    "gardener cook clerk judge"
)
TOOLS = _words(
    "hammer lantern compass ladder barrel mirror kettle blanket basket bottle candle camera drill engine funnel guitar "
    "helmet needle pencil radio shovel telescope umbrella violin wrench"
)
SYLLABLES = _words(
    "ba be bo da de do fa fe ga go ka ke ko la le lo ma me mo na ne no pa pe ra re ro sa se so ta te to va ve vo za ze "
    "zo lin mar ton ver dal ril nor kas tem bur"
)

ADJECTIVES = _words(
    "old quiet small large bright narrow gentle heavy distant modern simple careful patient slow sudden wide empty "
    "steady ordinary curious wooden warm cold early late public private recent local common"
)
NOUNS = _words(
    "morning report meeting street market window letter garden winter summer story table road committee neighbor "
    "visitor village engineer train boat plan question answer machine system result season picture habit voice lesson "
    "rule tradition journey problem idea project team record page chapter member guest child parent worker customer "
    "manager student shelf door wall roof field forest lake hill path corner kitchen lamp clock coat hat bag paper "
    "book map song game photo weather wind rain snow cloud"
)
VERBS = _words(
    "watched described repaired carried opened noticed remembered ignored followed discussed cleaned moved painted "
    "visited measured answered finished changed copied planned collected mentioned studied explained avoided found"
)
ADVERBS = _words(
    "slowly quietly often rarely carefully again later together nearby quickly almost usually finally already gladly"
)
PREPOSITIONS = _words("near behind beside above below across through around before after without inside outside toward")
CONNECTIVES = ("because", "although", "while", "until", "but")
OPENINGS = ("In general,", "As a rule,", "Later that week,", "For some reason,", "Most of the time,", "Before long,")
ALL_WORDS = (
    ADJECTIVES + NOUNS + VERBS + ADVERBS + PREPOSITIONS + PLACE_NAMES + PLACE_KINDS + FIRST_NAMES + LAST_NAMES
    + CITIES + COLORS + ANIMALS + FOODS + JOBS + TOOLS + MONTHS
)  # fmt: skip


def pick(rng: Random, words: Sequence[str]) -> str:
    """One of `words`, uniformly."""
    return words[int(rng.random() * len(words))]


def number(rng: Random, digits: int | None = None) -> str:
    """A decimal number without leading zeros, of `digits` digits (default: 3 to 6)."""
    length = digits or rng.choice((3, 4, 5, 5, 6, 6))
    return str(rng.randint(10 ** (length - 1), 10**length - 1))


def invented_name(rng: Random) -> str:
    """A capitalised name of two or three syllables that is in no list, so it costs several tokens."""
    return "".join(pick(rng, SYLLABLES) for _ in range(rng.choice((2, 3)))).capitalize()


def _indefinite(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def noun_phrase(rng: Random) -> str:
    """A phrase such as `the quiet morning`."""
    shape = rng.random()
    if shape < 0.45:
        return f"the {pick(rng, ADJECTIVES)} {pick(rng, NOUNS)}"
    if shape < 0.75:
        return f"the {pick(rng, NOUNS)}"
    if shape < 0.9:
        return f"{_indefinite(pick(rng, ADJECTIVES))} {pick(rng, NOUNS)}"
    return f"every {pick(rng, NOUNS)}"


def clause(rng: Random) -> str:
    """A phrase with subject and verb, such as `the road followed the lake`."""
    shape = rng.random()
    subject = noun_phrase(rng)
    if shape < 0.5:
        return f"{subject} {pick(rng, VERBS)} {noun_phrase(rng)}"
    if shape < 0.75:
        return f"{subject} {pick(rng, VERBS)} {noun_phrase(rng)} {pick(rng, PREPOSITIONS)} {noun_phrase(rng)}"
    if shape < 0.9:
        return f"{subject} was {pick(rng, ADVERBS)} {pick(rng, VERBS)} {pick(rng, PREPOSITIONS)} {noun_phrase(rng)}"
    return f"{subject} and {noun_phrase(rng)} {pick(rng, ADVERBS)} {pick(rng, VERBS)} {noun_phrase(rng)}"


def _word_salad(rng: Random) -> str:
    """Words in no order at all, so that a reader cannot rely on grammar alone."""
    return " ".join(pick(rng, ALL_WORDS) for _ in range(rng.randint(5, 14)))


def _body(rng: Random) -> str:
    shape = rng.random()
    if shape < 0.04:
        return _word_salad(rng)
    if shape < 0.28:
        return clause(rng)
    if shape < 0.40:
        return f"{clause(rng)}, and {clause(rng)}"
    if shape < 0.48:
        return f"{clause(rng)} {pick(rng, CONNECTIVES)} {clause(rng)}"
    if shape < 0.58:
        return f"{pick(rng, PREPOSITIONS)} {noun_phrase(rng)}, {clause(rng)}"
    if shape < 0.66:
        return f"when {clause(rng)}, {clause(rng)}"
    if shape < 0.70:
        return f"{pick(rng, OPENINGS)} {clause(rng)}"
    if shape < 0.77:
        return f"it was {pick(rng, ADVERBS)} {pick(rng, ADJECTIVES)} {pick(rng, PREPOSITIONS)} {noun_phrase(rng)}"
    if shape < 0.84:
        return f"{pick(rng, FIRST_NAMES)} {pick(rng, VERBS)} {noun_phrase(rng)} in {pick(rng, MONTHS)}"
    if shape < 0.90:
        count = number(rng, rng.choice((2, 3, 4)))
        return f"{noun_phrase(rng)} {pick(rng, VERBS)} {count} {pick(rng, FOODS)} in {pick(rng, CITIES)}"
    if shape < 0.95:
        place = f"{pick(rng, PLACE_NAMES)} {pick(rng, PLACE_KINDS)}"
        return f"{noun_phrase(rng)} {pick(rng, PREPOSITIONS)} the {place} was {pick(rng, ADJECTIVES)}"
    return f"nobody {pick(rng, VERBS)} the {pick(rng, COLORS)} {pick(rng, TOOLS)} {pick(rng, ADVERBS)}"


def filler_sentence(rng: Random) -> str:
    """One sentence of prose that answers no question, at most about 40 tokens long."""
    body = _body(rng)
    return f"{body[0].upper()}{body[1:]}."
