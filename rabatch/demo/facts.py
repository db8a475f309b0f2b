"""The facts planted in demo documents: sentences that state them, questions that ask for them, answers.

Four kinds: `single` (people, places, numbered things with an attribute), `many_keys` (key-value sentences of one
form), `several_values` (one key, two or three values in sentences far apart) and `two_hop` (two sentences have to be
combined; the answer names the bridge aloud, so that each hop is one retrieval).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from rabatch.demo.grammar import (
    ANIMALS,
    CITIES,
    COLORS,
    FIRST_NAMES,
    FOODS,
    JOBS,
    LAST_NAMES,
    MONTHS,
    PLACE_KINDS,
    PLACE_NAMES,
    TOOLS,
    invented_name,
    number,
    pick,
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted fact. `sentences[i]` states `values[i]`; `keys` are what no other fact of the document may state."""

    kind: str
    keys: tuple[str, ...]
    sentences: tuple[str, ...]
    values: tuple[str, ...]
    question: str
    expected: str


@dataclass(frozen=True, slots=True)
class Entities:
    """What the facts of one document are about. Few entities with many attributes make near-duplicate facts."""

    people: Sequence[str]
    places: Sequence[str]
    numbers: Sequence[str]


@dataclass(frozen=True, slots=True)
class Template:
    """How one attribute of an entity `{e}` is stated with value `{v}`, and asked for."""

    attribute: str
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    value: Callable[[Random], str]


def person(rng: Random) -> str:
    """A first and a last name, now and then invented."""
    last = invented_name(rng) if rng.random() < 0.2 else pick(rng, LAST_NAMES)
    return f"{pick(rng, FIRST_NAMES)} {last}"


def place(rng: Random) -> str:
    """A name and a kind of place, such as `Harbor station`."""
    name = invented_name(rng) if rng.random() < 0.2 else pick(rng, PLACE_NAMES)
    return f"{name} {pick(rng, PLACE_KINDS)}"


def numbered(rng: Random) -> str:
    """The number of a thing: 3 to 6 digits, or two groups of three."""
    if rng.random() < 0.6:
        return number(rng, rng.choice((3, 4, 5, 6)))
    return f"{number(rng, 3)}-{number(rng, 3)}"


def _date(rng: Random) -> str:
    return f"{pick(rng, MONTHS)} {rng.randint(1900, 2020)}"


def _colored_tool(rng: Random) -> str:
    return f"{pick(rng, COLORS)} {pick(rng, TOOLS)}"


def _amount(rng: Random) -> str:
    return f"{number(rng, rng.choice((2, 3)))} {pick(rng, FOODS)}"


def _one_of(words: Sequence[str]) -> Callable[[Random], str]:
    return lambda rng: pick(rng, words)


PERSON_TEMPLATES = (
    Template(
        "home", ("{e} lives in {v}.", "The home of {e} is {v}."),
        ("Where does {e} live?", "What is the home of {e}?"), _one_of(CITIES),
    ),
    Template(
        "job", ("{e} works as a {v}.", "The job of {e} is {v}."),
        ("What is the job of {e}?", "What does {e} work as?"), _one_of(JOBS),
    ),
    Template(
        "pet", ("{e} owns a {v}.", "The pet of {e} is a {v}."),
        ("What is the pet of {e}?", "Which pet does {e} own?"), _one_of(ANIMALS),
    ),
    Template(
        "color", ("The favorite color of {e} is {v}.",), ("What is the favorite color of {e}?",), _one_of(COLORS)
    ),
    Template("phone", ("The phone number of {e} is {v}.",), ("What is the phone number of {e}?",), number),
    Template(
        "badge", ("{e} carries badge {v}.", "The badge of {e} is {v}."),
        ("Which badge does {e} carry?", "What is the badge of {e}?"), number,
    ),
    Template("birth", ("{e} was born in {v}.",), ("When was {e} born?",), _date),
    Template("food", ("{e} always orders {v}.",), ("What does {e} always order?",), _one_of(FOODS)),
    Template("tool", ("{e} borrowed the {v}.",), ("What did {e} borrow?",), _colored_tool),
)  # fmt: skip
PLACE_TEMPLATES = (
    Template(
        "manager",
        ("{v} manages the {e}.", "The manager of the {e} is {v}."),
        ("Who manages the {e}?", "Who is the manager of the {e}?"),
        person,
    ),
    Template("city", ("The {e} is located in {v}.",), ("Where is the {e} located?",), _one_of(CITIES)),
    Template("door", ("The door of the {e} is {v}.",), ("What color is the door of the {e}?",), _one_of(COLORS)),
    Template("goods", ("The {e} stores {v}.",), ("What does the {e} store?",), _one_of(FOODS)),
    Template("opening", ("The {e} opened in {v}.",), ("When did the {e} open?",), _date),
)
PLACE_NUMBERS = (
    "access code", "phone extension", "room number", "serial number", "locker number", "annual budget",
    "visitor count", "floor area", "license number", "gate code", "meter reading", "account number",
)  # fmt: skip
THING_TEMPLATES = (
    Template("invoice", ("Invoice {e} was approved by {v}.",), ("Who approved invoice {e}?",), person),
    Template("ticket", ("Ticket {e} is assigned to {v}.",), ("Who is ticket {e} assigned to?",), person),
    Template("parcel", ("Parcel {e} was shipped to {v}.",), ("Where was parcel {e} shipped to?",), _one_of(CITIES)),
    Template("order", ("Order {e} contains {v}.",), ("What does order {e} contain?",), _amount),
    Template("crate", ("Crate {e} holds the {v}.",), ("What does crate {e} hold?",), _colored_tool),
)
KEY_TEMPLATES = (
    Template("key", ("The value of key {e} is {v}.",), ("What is the value of key {e}?",), number),
    Template("field", ("Field {e} is set to {v}.",), ("What is field {e} set to?",), number),
    Template("node", ("The owner of node {e} is {v}.",), ("Who is the owner of node {e}?",), person),
)


def _from_template(rng: Random, kind: str, template: Template, entity: str) -> Fact:
    value = template.value(rng)
    return Fact(
        kind=kind,
        keys=(f"{entity}/{template.attribute}",),
        sentences=(pick(rng, template.sentences).format(e=entity, v=value),),
        values=(value,),
        question=pick(rng, template.questions).format(e=entity),
        expected=value,
    )


def _place_number(name: str) -> Template:
    return Template(name, (f"The {name} of the {{e}} is {{v}}.",), (f"What is the {name} of the {{e}}?",), number)


def _single(rng: Random, entities: Entities) -> Fact:
    group = rng.random()
    if group < 0.22:
        return _from_template(rng, "single", _place_number(pick(rng, PLACE_NUMBERS)), pick(rng, entities.places))
    if group < 0.36:
        return _from_template(rng, "single", rng.choice(PLACE_TEMPLATES), pick(rng, entities.places))
    if group < 0.7:
        return _from_template(rng, "single", rng.choice(PERSON_TEMPLATES), pick(rng, entities.people))
    return _from_template(rng, "single", rng.choice(THING_TEMPLATES), pick(rng, entities.numbers))


def _many_keys(rng: Random, entities: Entities) -> Fact:
    template = rng.choices(KEY_TEMPLATES, weights=(3, 1, 1))[0]
    return _from_template(rng, "many_keys", template, pick(rng, entities.numbers))


def _distinct(rng: Random, draw: Callable[[Random], str], n_values: int) -> list[str]:
    values: list[str] = []
    while len(values) < n_values:
        value = draw(rng)
        if value not in values:
            values.append(value)
    return values


def _several_values(rng: Random, entities: Entities) -> Fact:
    """The sentences state the order themselves, by a counter or by naming the value before, and whether more follow."""
    n_values = rng.choice((2, 3))
    form = rng.random()
    keys: tuple[str, ...]
    if form < 0.5:
        thing = f"parcel {pick(rng, entities.numbers)}"
        values = _distinct(rng, person, n_values)
        # A carrier belongs to one parcel only, so that "from X to" leads to one sentence.
        keys = (f"{thing}/carriers", *(f"{value}/carrier" for value in values))
        statements = [f"P{thing[1:]} was first given to {values[0]}"]
        statements += [f"P{thing[1:]} passed from {a} to {b}" for a, b in pairwise(values)]
        question = f"Which {n_values} people carried {thing}?"
    elif form < 0.75:
        name = pick(rng, entities.places)
        values, keys = _distinct(rng, person, n_values), (f"{name}/guests",)
        statements = [f"Guest {i} of the {name} is {value}" for i, value in enumerate(values, start=1)]
        question = f"Who are guests 1 to {n_values} of the {name}?"
    else:
        name = pick(rng, entities.numbers)
        values, keys = _distinct(rng, number, n_values), (f"{name}/readings",)
        statements = [f"Reading {i} of meter {name} is {value}" for i, value in enumerate(values, start=1)]
        question = f"What are readings 1 to {n_values} of meter {name}?"
    sentences = (*(f"{statement}, among others." for statement in statements[:-1]), f"{statements[-1]}.")
    return Fact("several_values", keys, sentences, tuple(values), question, ", ".join(values))


def _two_hop(rng: Random, entities: Entities) -> Fact:
    """Person or crate -> place -> attribute of the place. The answer names the place first."""
    bridge = pick(rng, entities.places)
    if rng.random() < 0.6:
        start = pick(rng, entities.people)
        first, ask = f"{start} works at the {bridge}.", f"Where does {start} work"
    else:
        start = f"crate {pick(rng, entities.numbers)}"
        first, ask = f"C{start[1:]} is kept at the {bridge}.", f"Where is {start} kept"
    form = rng.random()
    if form < 0.4:
        attribute, value = "city", pick(rng, CITIES)
        second = f"The {bridge} is located in {value}."
        question, expected = f"{ask} and in which city is that?", f"{bridge} in {value}"
    elif form < 0.6:
        attribute, value = "manager", person(rng)
        second = f"The manager of the {bridge} is {value}."
        question, expected = f"{ask} and who is the manager there?", f"{bridge}, manager {value}"
    else:
        attribute, value = pick(rng, PLACE_NUMBERS), number(rng)
        second = f"The {attribute} of the {bridge} is {value}."
        question, expected = f"{ask} and what is the {attribute} there?", f"{bridge}, {attribute} {value}"
    keys = (f"{start}/place", f"{bridge}/{attribute}")
    return Fact("two_hop", keys, (first, second), (bridge, value), question, expected)


MAKERS: dict[str, Callable[[Random, Entities], Fact]] = {
    "single": _single,
    "many_keys": _many_keys,
    "several_values": _several_values,
    "two_hop": _two_hop,
}


def make_entities(rng: Random, n_entities: int, similarity: float = 0.5) -> Entities:
    """`n_entities` people, places and numbers each; `similarity` (0 to 1) is the share that resemble another one."""
    people = [person(rng) for _ in range(n_entities)]
    places = [place(rng) for _ in range(n_entities)]
    numbers = [numbered(rng) for _ in range(n_entities)]
    for i in range(n_entities):
        if rng.random() < similarity:
            people[i] = f"{people[i].split()[0]} {pick(rng, people).split()[1]}"
        if rng.random() < similarity:
            places[i] = f"{places[i].split()[0]} {pick(rng, PLACE_KINDS)}"
        if rng.random() < similarity:
            numbers[i] = f"{pick(rng, numbers)[:3]}{numbers[i][3:]}"
    return Entities(people, places, numbers)


def make_fact(rng: Random, kind: str, entities: Entities, taken: set[str]) -> Fact:
    """A fact of `kind` whose keys are not in `taken`; its keys are added there.

    Args:
        kind: a name in `MAKERS`.
        entities: what facts are about. When a draw of them is used up, new ones are invented.
    """
    for attempt in range(200):
        # A small document can use up its entities: later attempts draw new ones.
        fact = MAKERS[kind](rng, entities if attempt < 20 else make_entities(rng, 3, 0.0))
        if taken.isdisjoint(fact.keys):
            taken.update(fact.keys)
            return fact
    raise RuntimeError(f"no unused key left for a fact of kind {kind!r}")
