"""Six kinds of small reasoning problems: each writes queries and works them out step by step.

A query's text is all there is: a family parses it again to solve it, so that whoever holds a
query can tell the right answer, whatever the trace beside it claims.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORDS = (
    *("red", "blue", "green", "gold", "pink", "gray"),
    *("black", "white", "brown", "orange", "purple", "silver"),
)
MARKS = 10  # of the dial: results wrap around


@dataclass(frozen=True)
class Size:
    """How wide the alphabet of the queries is; the steps are the same.

    Attributes:
        largest_turn: Of the dial, in marks.
        digits: Additions use the digits below this.
        largest_sorted: Largest number to sort.
        words: How many of `WORDS` are in use.
    """

    largest_turn: int
    digits: int
    largest_sorted: int
    words: int


FULL = Size(largest_turn=9, digits=10, largest_sorted=30, words=12)
SMALL = Size(largest_turn=3, digits=6, largest_sorted=12, words=6)

Steps = list[str]


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Attributes:
        name: Its name in the `exercise` column.
        num_steps: Lines of a trace that can be wrong.
        draw: A random query; no two families' queries look alike.
        work: (lines of the trace, answer) of a query; the line of index `wrong` holds a slip,
            which all later lines and the answer build upon. None: no slip.
        feature: (index, size): which of `size` equally likely visible features a query has.
    """

    name: str
    num_steps: int
    draw: Callable[[random.Random, Size], str]
    work: Callable[[str, int | None], tuple[Steps, str]]
    feature: Callable[[str, Size], tuple[int, int]]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text) if word in WORDS]


# dial: turns on a dial of ten marks; the slip stops one mark too far.


def _draw_dial(rng: random.Random, size: Size) -> str:
    turns = [f"{rng.choice('+-')}{rng.randint(1, size.largest_turn)}" for _ in range(5)]
    return f"Dial at {rng.randrange(MARKS)}: {', '.join(turns)}."


def _work_dial(query: str, wrong: int | None) -> tuple[Steps, str]:
    mark = _numbers(query)[0]
    steps = []
    for index, turn in enumerate(re.findall(r"[+-]\d", query)):
        after = (mark + int(turn) + (index == wrong)) % MARKS
        steps.append(f"{mark}{turn}={after}")
        mark = after
    return steps, str(mark)


def _dial_feature(query: str, size: Size) -> tuple[int, int]:
    del size
    return _numbers(query)[0], MARKS


# addition: two numbers of four digits, column by column; the slip is in a column's carry.


def _draw_addition(rng: random.Random, size: Size) -> str:
    first, second = (",".join(str(rng.randrange(size.digits)) for _ in range(4)) for _ in range(2))
    return f"Add {first} and {second}."


def _work_addition(query: str, wrong: int | None) -> tuple[Steps, str]:
    digits = _numbers(query)
    steps, answer, carry = [], [], 0
    for index, (a, b) in enumerate(zip(digits[3::-1], digits[:3:-1], strict=True)):
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        answer.append(total % 10)
        carry = total // 10
        if index == wrong:
            carry = 1 - carry
    answer += [1] if carry else []
    return steps, ",".join(map(str, reversed(answer)))


def _addition_feature(query: str, size: Size) -> tuple[int, int]:
    return _numbers(query)[3], size.digits


# sorting: numbers inserted one by one; the slip puts one of them a place too far left or right.


def _draw_sorting(rng: random.Random, size: Size) -> str:
    return f"Sort {','.join(map(str, rng.sample(range(1, size.largest_sorted + 1), 5)))}."


def _work_sorting(query: str, wrong: int | None) -> tuple[Steps, str]:
    numbers = _numbers(query)
    order = numbers[:1]
    steps = [str(order[0])]
    for index, number in enumerate(numbers[1:]):
        place = sum(other < number for other in order)
        if index == wrong:
            place += -1 if place else 1
        order.insert(place, number)
        steps.append(",".join(map(str, order)))
    return steps, steps[-1]


def _sorting_feature(query: str, size: Size) -> tuple[int, int]:
    return _numbers(query)[0] - 1, size.largest_sorted


# cards: a row of four cards is rearranged; the slip mixes up the two in the middle.

_MOVES: dict[str, Sequence[int]] = {
    "reverse": (3, 2, 1, 0),
    "rotate": (1, 2, 3, 0),
    "swap": (1, 0, 2, 3),  # the first two
    "trade": (3, 1, 2, 0),  # first and last
}


def _draw_cards(rng: random.Random, size: Size) -> str:
    moves = rng.choices(tuple(_MOVES), k=4)
    return f"Cards {' '.join(rng.sample(WORDS[: size.words], 4))}: {', '.join(moves)}."


def _work_cards(query: str, wrong: int | None) -> tuple[Steps, str]:
    row, moves = query.removeprefix("Cards ").rstrip(".").split(": ")
    cards = row.split()
    steps = []
    for index, move in enumerate(moves.split(", ")):
        cards = [cards[place] for place in _MOVES[move]]
        if index == wrong:
            cards[1], cards[2] = cards[2], cards[1]
        steps.append(f"{move} {' '.join(cards)}")
    return steps, f"Cards {' '.join(cards)}"


def _first_word_feature(query: str, size: Size) -> tuple[int, int]:
    return WORDS.index(_words(query)[0]), size.words


# doors: a walk through six rooms in a circle; the slip goes through a door backwards.


def _draw_doors(rng: random.Random, size: Size) -> str:
    rooms = rng.sample(WORDS[: size.words], 6)
    doors = [f"{a} to {b}" for a, b in zip(rooms, rooms[1:] + rooms[:1], strict=True)]
    rng.shuffle(doors)
    return f"Doors: {', '.join(doors)}. Go 4 from {rng.choice(rooms)}."


def _work_doors(query: str, wrong: int | None) -> tuple[Steps, str]:
    *ends, room = _words(query)
    onward = dict(zip(ends[::2], ends[1::2], strict=True))
    backward = {b: a for a, b in onward.items()}
    steps = []
    for index in range(_numbers(query)[0]):
        after = (backward if index == wrong else onward)[room]
        steps.append(f"From {room} to {after}")
        room = after
    return steps, f"At {room}"


def _last_word_feature(query: str, size: Size) -> tuple[int, int]:
    return WORDS.index(_words(query)[-1]), size.words


# tally: how often one color occurs; the slip counts a wrong one, or misses a right one.


def _draw_tally(rng: random.Random, size: Size) -> str:
    target, *others = rng.sample(WORDS[: size.words], 4)
    row = [target if rng.random() < 0.4 else rng.choice(others) for _ in range(8)]
    return f"Count {target} in {' '.join(row)}."


def _work_tally(query: str, wrong: int | None) -> tuple[Steps, str]:
    target, *row = _words(query)
    count, shown = 0, []
    for index, word in enumerate(row):
        count += (word == target) != (index == wrong)
        shown.append(f"{word}={count}")
    return [f"See {' '.join(shown)}"], str(count)


FAMILIES = {
    family.name: family
    for family in (
        Family("dial", 5, _draw_dial, _work_dial, _dial_feature),
        Family("addition", 4, _draw_addition, _work_addition, _addition_feature),
        Family("sorting", 4, _draw_sorting, _work_sorting, _sorting_feature),
        Family("cards", 4, _draw_cards, _work_cards, _first_word_feature),
        Family("doors", 4, _draw_doors, _work_doors, _last_word_feature),
        Family("tally", 8, _draw_tally, _work_tally, _first_word_feature),
    )
}
"""Every family by name."""

_OPENINGS = {
    "Dial": "dial",
    "Add": "addition",
    "Sort": "sorting",
    "Cards": "cards",
    "Doors:": "doors",
    "Count": "tally",
}


def family_of(query: str) -> Family | None:
    """The family that wrote a query, or None for a text of another origin."""
    name = _OPENINGS.get(query.split(" ", 1)[0])
    return None if name is None else FAMILIES[name]


def every_text() -> list[str]:
    """Texts whose tokens together are all that any problem is ever made of.

    A model with a reduced vocabulary takes its ids from these.
    """
    numbers = [f" {n},{n}\n{n}={n}+{n}-{n}:{n}." for n in range(FULL.largest_sorted + 1)]
    words = " ".join(("Cards", *WORDS))
    moves = "\n".join(f"{move} {WORDS[0]}" for move in _MOVES)
    rng = random.Random(0)
    examples = []
    for family in FAMILIES.values():
        for _ in range(20):
            query = family.draw(rng, FULL)
            steps, answer = family.work(query, None)
            examples += [query, "\n".join(steps), answer]
    return [*numbers, words, moves, *examples]
