"""Coloured shapes in a picture, and several pictures compared.

Held out for the test: of colour, shape and place (nine in a picture), every seventh combination; whatever is in a scene
of the test is of these, and nothing in training is; only what differs between two pictures may be any. Each thing is in
a place of its own, so none hides another.

A model that must decide with its first word does not learn to, nor one that must look back over many words. So an
answer about several pictures says what is in each, one after another, before it compares. An answer whether a thing is
there names the things row by row until it comes to that one; one that counts names all, and gives each of the kind its
number. What follows from these words is learned from text: many such rows in training name the things in the question
instead of showing them. Pictures that are compared by what they show hold one thing each, so that what is compared
stands in the same places of every answer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from scripts.nano.pictures import (
    COLOURS,
    SHAPES,
    Thing,
    article,
    background,
    is_held,
    picture_part,
    png,
    render,
    shown,
    toned,
)
from scripts.nano.rows import Sample, Sense, Split, assistant, counts, pick, user
from scripts.nano.text import capital, wording
from scripts.nano.words import NUMBERS

PLACES = (
    "at the top left", "at the top", "at the top right", "on the left", "in the middle", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
# What is furthest in a direction, and how far it is ahead of the next; x and y are in sides of the picture.
SIDES = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}
AHEAD = 0.2
BESIDE = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
ORDINALS = ("first", "second", "third")
MOST_THINGS = 5
# How often a training row that counts or finds things names them instead of showing them, and how often one that finds
# none of a kind is left out.
NAMED = 0.5
NONE_LEFT_OUT = {"train": 0.9, "test": 0.95}

HOW_MANY = (
    "How many {0} are there?", "How many {0} do you see?", "Count the {0}.", "How many {0} are in the picture?",
    "Can you count the {0}?", "What is the number of {0}?", "Tell me how many {0} there are.",
    "How many {0} does the picture show?", "Look at the picture. How many {0} are there?", "How many {0} can you see?",
    "Please count the {0}.", "Count the {0} in the picture.", "Tell me the number of {0}.",
)  # fmt: skip
COLOUR = (
    "Which colour is the {0}?", "What colour is the {0}?", "What is the colour of the {0}?",
    "Tell me the colour of the {0}.", "Which colour does the {0} have?", "The {0} is of which colour?",
    "Look at the {0}. Which colour is it?", "Name the colour of the {0}.", "What colour does the {0} have?",
    "In which colour do you see the {0}?", "Tell me which colour the {0} is.", "Look at the {0}. What colour is it?",
    "Name the colour that the {0} has.",
)  # fmt: skip
SIDE = (
    "What is {0}?", "Which thing is {0}?", "What do you see {0}?", "Tell me what is {0}.", "Name the thing {0}.",
    "Which thing do you see {0}?", "What can you see {0}?", "Look {0}. What is there?", "What is there {0}?",
    "Which shape is {0}?", "Which thing is there {0}?", "Tell me which thing is {0}.", "Look {0}. What do you see?",
)  # fmt: skip
NEXT = (
    "What is {0} the {1}?", "Which thing is {0} the {1}?", "What do you see {0} the {1}?",
    "Tell me what is {0} the {1}.",
    "Name the thing {0} the {1}.", "Which thing do you see {0} the {1}?", "Look {0} the {1}. What is there?",
    "What is there {0} the {1}?", "Which shape is {0} the {1}?", "What can you see {0} the {1}?",
    "Look {0} the {1}. What do you see?", "Tell me which thing is {0} the {1}.", "Which thing is there {0} the {1}?",
)  # fmt: skip
THERE = (
    "Is there {0}?", "Is there {0} in the picture?", "Do you see {0}?", "Can you see {0}?",
    "Does the picture show {0}?",
    "Can you find {0}?", "Look at the picture. Is there {0}?", "Is {0} in the picture?", "Tell me if there is {0}.",
    "Look for {0}. Is it there?", "Do you see {0} in the picture?", "Tell me if you see {0}.",
    "Can you see {0} in the picture?",
)  # fmt: skip
DESCRIBE = (
    "What do you see?", "What is in the picture?", "Describe the picture.", "What does the picture show?",
    "Tell me what you see.", "Say what is in the picture.", "What can you see, and where?",
    "Where is what in the picture?",
    "Describe what you see.", "Look at the picture. What is where?", "What is there in the picture?",
    "Tell me what is in the picture.", "Say what you see, and where.",
)  # fmt: skip
MORE = (
    "Which picture has {0} things?", "Which picture shows {0} things?", "In which picture are there {0} things?",
    "Where are there {0} things?", "Compare the pictures. Which has {0} things?", "Which picture has got {0} things?",
    "Count the things. Which picture has {0}?", "Tell me which picture has {0} things.",
    "Which of them has {0} things?",
    "In which picture do you see {0} things?", "Tell me which picture shows {0} things.",
    "Compare the pictures. Which shows {0} things?", "Which of the pictures has {0} things?",
)  # fmt: skip
WHICH = (
    "Which picture shows {0}?", "Which picture has {0}?", "In which picture is {0}?", "Where is {0}?",
    "Which one shows {0}?", "In which picture do you see {0}?", "Find {0}. Which picture is it in?",
    "Tell me which picture shows {0}.", "Which of them shows {0}?", "There is {0} in which picture?",
    "Tell me which picture has {0}.", "Which one has {0}?", "Which of them has {0}?",
)  # fmt: skip
SAME = (
    "Are the pictures the same?", "Do both pictures show the same?", "Are these the same?", "Is it the same picture?",
    "Do you see the same things in both?", "Are both pictures the same?", "Compare the pictures. Are they the same?",
    "Do they show the same?", "Is the second picture the same as the first?", "Tell me if they are the same.",
    "Tell me if both pictures are the same.", "Do both show the same things?",
    "Is the first picture the same as the second?",
)  # fmt: skip
DIFFERENT = (
    "What is different?", "What differs?", "Compare the pictures. What is different?", "What is the difference?",
    "What has changed?", "What changed from the first picture to the second?", "Tell me what is different.",
    "How do the pictures differ?", "Name the difference.", "In what do they differ?", "Tell me what has changed.",
    "What is the difference of the pictures?", "In what do the pictures differ?", "Tell me the difference.",
)  # fmt: skip
ASKED = (HOW_MANY, COLOUR, SIDE, NEXT, THERE, DESCRIBE, MORE, WHICH, SAME, DIFFERENT)


class Question(NamedTuple):
    """The things of each picture, the wordings of a question, what fills them, the answer's sentence and its words."""

    pictures: Sequence[Sequence[Thing]]
    choices: Sequence[str]
    words: tuple[str, ...]
    said: str
    answer: str


Ask = Callable[[np.random.Generator, Split], Question | None]


def scene_senses(scale: float = 1.0) -> tuple[Sense, ...]:
    """The senses of scenes: one, and several compared."""
    return Sense("scene", scene, counts(scale, 60_000, 600)), Sense("compare", compare, counts(scale, 40_000, 300))


def scene(draw: np.random.Generator, split: Split) -> Sample:
    """A question about one scene."""
    asks = (how_many, how_many, how_many, colour, side, beside, there, describe, describe)
    # What is concluded takes longest to learn.
    ask = pick(draw, asks if split == "test" else (*asks[:-1], how_many, there, there))
    if split == "train" and ask in (how_many, there) and draw.random() < NAMED:
        return named(draw, ask)
    return _row(draw, split, ask, (64, 96, 128))


def named(draw: np.random.Generator, ask: Ask) -> Sample:
    """A question of training about things that are named before or after it, row by row."""
    while (asked := ask(draw, "train")) is None or ":" not in asked.said:
        pass
    (pictured,) = asked.pictures
    things, question = capital(_row_by_row(pictured)), wording(draw, asked.choices, "train").format(*asked.words)
    text = f"{things}. {question}" if draw.random() < 0.5 else f"{question} {things}."
    return Sample([user(text), assistant(asked.said)], asked.answer)


def compare(draw: np.random.Generator, split: Split) -> Sample:
    """A question about two or three scenes."""
    return _row(draw, split, pick(draw, (more, which, same, different)), (64, 96))


def _row(draw: np.random.Generator, split: Split, ask: Ask, sizes: Sequence[int]) -> Sample:
    asked = None
    while asked is None:
        asked = ask(draw, split)
    height, width = (int(pick(draw, sizes)) for _ in range(2))
    names = [f"{i}.png" for i in range(len(asked.pictures))]
    media = {
        name: png(scenery(draw, things, height, width)) for name, things in zip(names, asked.pictures, strict=True)
    }
    question = wording(draw, asked.choices, split).format(*asked.words)
    parts = shown(draw, question, *(picture_part(name) for name in names))
    return Sample([user(*parts), assistant(asked.said)], asked.answer, media)


def scenery(draw: np.random.Generator, things: Sequence[Thing], height: int, width: int) -> Image.Image:
    """A picture of things."""
    return render(background(draw, things, height, width), things, toned(draw, things))


def place_of(thing: Thing) -> int:
    """The number of a thing's place among nine, row by row."""
    return 3 * int(3 * thing.y) + int(3 * thing.x)


def things_of(draw: np.random.Generator, split: Split, number: int) -> list[Thing]:
    """A scene of things in different places, of few colours and shapes, so that some are alike."""
    while True:
        colours = draw.permutation(list(COLOURS))[: int(draw.integers(2, 5))].tolist()
        shapes = draw.permutation(SHAPES)[: int(draw.integers(1, 4))].tolist()
        places = draw.permutation(9)[:number].tolist()
        fitting = [
            [(c, s) for c in colours for s in shapes if is_held(c, s, place) == (split == "test")] for place in places
        ]
        if all(fitting):
            return [_placed(draw, pick(draw, kinds), place) for kinds, place in zip(fitting, places, strict=True)]


def _placed(draw: np.random.Generator, kind: tuple[str, str], place: int) -> Thing:
    x, y = (np.array([place % 3, place // 3]) * 2 + 1) / 6 + draw.uniform(-0.025, 0.025, 2)
    return Thing(*kind, float(x), float(y), float(draw.uniform(0.11, 0.14)))


def changed(draw: np.random.Generator, split: Split, thing: Thing, what: str) -> Thing:
    """A thing of another colour or shape, or at another place."""
    while True:
        colour = pick(draw, tuple(COLOURS)) if what == "colour" else thing.colour
        shape = pick(draw, SHAPES) if what == "shape" else thing.shape
        place = int(draw.integers(9)) if what == "place" else place_of(thing)
        is_other = (colour, shape, place) != (thing.colour, thing.shape, place_of(thing))
        if is_other and (split == "test" or not is_held(colour, shape, place)):
            where = _placed(draw, (colour, shape), place) if what == "place" else thing
            return Thing(colour, shape, where.x, where.y, thing.radius)


def how_many(draw: np.random.Generator, split: Split) -> Question | None:
    """The number of things of a shape, of a colour, or of all."""
    things = things_of(draw, split, int(draw.integers(1, MOST_THINGS + 1)))
    of = pick(draw, ("shape", "colour", "all"))
    kind = pick(draw, SHAPES if of == "shape" else tuple(COLOURS))
    number = len(things) if of == "all" else sum(_is_of(thing, kind) for thing in things)
    if number == 0 and draw.random() < NONE_LEFT_OUT[split] or number == 1 and draw.random() < 0.5:
        return None
    one = {"shape": kind, "colour": f"{kind} thing", "all": "thing"}[of]
    amount = "no" if number == 0 else NUMBERS[number]
    found = f"there is one {one}." if number == 1 else f"there are {amount} {one}s."
    said = capital(found) if of == "all" else _after(_numbered(things, kind), found)
    return Question([things], HOW_MANY, (f"{one}s",), said, amount)


def _is_of(thing: Thing, kind: str) -> bool:
    """Whether a thing has a colour or a shape."""
    return kind in (thing.shape, thing.colour)


def colour(draw: np.random.Generator, split: Split) -> Question | None:
    """The colour of the only thing of its shape."""
    things = things_of(draw, split, int(draw.integers(1, 4)))
    thing = pick(draw, things)
    if sum(other.shape == thing.shape for other in things) > 1:
        return None
    return Question([things], COLOUR, (thing.shape,), f"The {thing.shape} is {thing.colour}.", thing.colour)


def side(draw: np.random.Generator, split: Split) -> Question | None:
    """What is furthest in a direction."""
    things = things_of(draw, split, int(draw.integers(2, 4)))
    where = pick(draw, tuple(SIDES))
    ahead = sorted((thing.x * SIDES[where][0] + thing.y * SIDES[where][1], i) for i, thing in enumerate(things))
    if ahead[-1][0] - ahead[-2][0] < AHEAD:
        return None
    name = things[ahead[-1][1]].name
    return Question([things], SIDE, (where,), f"{article(name).capitalize()} is {where}.", name)


def beside(draw: np.random.Generator, split: Split) -> Question | None:
    """What is beside the other one of two things."""
    things = things_of(draw, split, 2)
    (one, other), where = things, pick(draw, tuple(BESIDE))
    x, y = BESIDE[where]
    places = [np.array(divmod(place_of(thing), 3)) for thing in things]
    along = int((places[0] - places[1]) @ (y, x))
    if along <= 0 or abs(int((places[0] - places[1]) @ (x, y))) or one.shape == other.shape:
        return None
    said = f"{article(one.name).capitalize()} is {where} the {other.shape}."
    return Question([things], NEXT, (where, other.shape), said, one.name)


def there(draw: np.random.Generator, split: Split) -> Question | None:
    """Whether a thing is there; one that is not has the colour or the shape of one that is."""
    things = things_of(draw, split, int(draw.integers(1, 5)))
    thing = pick(draw, things)
    is_there = draw.random() < 0.5
    if not is_there:
        other = pick(draw, tuple(COLOURS)), thing.shape
        colour, shape = pick(draw, (other, (thing.colour, pick(draw, SHAPES))))
        thing = Thing(colour, shape, thing.x, thing.y, thing.radius)
        if thing.name in [seen.name for seen in things]:
            return None
    found = f"yes, there is {article(thing.name)}." if is_there else f"no, there is no {thing.name}."
    said = _after(_row_by_row(things, thing.name), found)
    return Question([things], THERE, (article(thing.name),), said, "yes" if is_there else "no")


def describe(draw: np.random.Generator, split: Split) -> Question:
    """What the only thing is, and where."""
    (thing,) = things_of(draw, split, 1)
    where = PLACES[place_of(thing)]
    said = f"{article(thing.name).capitalize()} is {where}."
    return Question([[thing]], DESCRIBE, (), said, f"{thing.name} is {where}")


def more(draw: np.random.Generator, split: Split) -> Question | None:
    """Which of two pictures has more things, or which of three the most."""
    pictures = [things_of(draw, split, int(draw.integers(1, MOST_THINGS + 1))) for _ in range(pick(draw, (2, 2, 3)))]
    numbers = [len(things) for things in pictures]
    if numbers.count(max(numbers)) > 1:
        return None
    how, which = "more" if len(pictures) == 2 else "the most", ORDINALS[int(np.argmax(numbers))]
    seen = ["one thing" if number == 1 else f"{NUMBERS[number]} things" for number in numbers]
    said = _after(_then(seen), f"the {which} picture has {how} things.")
    return Question(pictures, MORE, (how,), said, which)


def which(draw: np.random.Generator, split: Split) -> Question | None:
    """Which of two or three pictures shows a thing."""
    pictures = [things_of(draw, split, 1) for _ in range(pick(draw, (2, 2, 3)))]
    number = int(draw.integers(len(pictures)))
    shapes = [thing.shape for (thing,) in pictures]
    if shapes.count(shapes[number]) > 1:
        return None
    shape, ordinal = shapes[number], ORDINALS[number]
    seen = [f"{name} is {place}" for name, place in zip(_named(pictures), ORDINALS, strict=False)]
    return Question(pictures, WHICH, (article(shape),), _after(_then(seen), f"the {shape} is {ordinal}."), ordinal)


def same(draw: np.random.Generator, split: Split) -> Question:
    """Whether two pictures show the same thing; where not, the second has another colour or shape."""
    (thing,) = things_of(draw, split, 1)
    is_same = draw.random() < 0.5
    other = thing if is_same else changed(draw, split, thing, pick(draw, ("colour", "shape")))
    pictures = [[thing], [other]]
    said = _after(_then(_named(pictures)), "yes, they show the same." if is_same else "no, they are not the same.")
    return Question(pictures, SAME, (), said, "yes" if is_same else "no")


def different(draw: np.random.Generator, split: Split) -> Question:
    """In what the only thing of two pictures differs."""
    (first,) = things_of(draw, split, 1)
    what = pick(draw, ("colour", "shape", "place"))
    second = changed(draw, split, first, what)
    seen = [f"{article(thing.name)} {PLACES[place_of(thing)]}" for thing in (first, second)]
    return Question([[first], [second]], DIFFERENT, (), _after(_then(seen), f"the {what} is different."), what)


def _named(pictures: Sequence[Sequence[Thing]]) -> list[str]:
    """The only thing of each picture."""
    return [article(thing.name) for (thing,) in pictures]


def _then(seen: Sequence[str]) -> str:
    """What is in each picture, one after another."""
    return ", then ".join(seen)


def _row_by_row(things: Sequence[Thing], sought: str = "") -> str:
    """The things of one picture, row by row from the top left, as far as the one that is sought."""
    names = [thing.name for thing in sorted(things, key=place_of)]
    end = names.index(sought) + 1 if sought in names else len(names)
    return ", ".join(article(name) for name in names[:end])


def _numbered(things: Sequence[Thing], kind: str) -> str:
    """The things of one picture, row by row; after each that is of a kind, how many these are as yet."""
    words, number = list[str](), 0
    for thing in sorted(things, key=place_of):
        words.append(article(thing.name))
        if _is_of(thing, kind):
            number += 1
            words.append(NUMBERS[number])
    return ", ".join(words)


def _after(seen: str, conclusion: str) -> str:
    """A sentence that says what is seen, and then what follows."""
    return capital(f"{seen}: {conclusion}")
