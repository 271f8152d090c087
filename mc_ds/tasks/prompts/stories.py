"""`Stories`: questions about a simulated world, whose sentences are spread over a long text.

    kind 1   where is a person?                            one fact
    kind 2   where is a thing?                             two facts: who took it, and went where
    kind 3   where was a thing before it was elsewhere?    three facts or more
    kind 4   what lies north of a place?                   one of two facts, whose order matters
    kind 5   who gave what to whom?                        one fact with three parts

These are the first five kinds of questions of bAbI (Weston et al., arXiv:1502.05698) in the manner
of BABILong (Kuratov et al., arXiv:2406.10149), but neither of these: world, names and sentences are
this project's own. As in BABILong, an answer counts if its first sentence names no other candidate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from pydantic import PositiveInt

from mc_ds.tasks.prompts.base import Prompt, PromptFamily
from mc_ds.tasks.prompts.page import Page

PERSONS = ("Anton", "Berta", "Cyrus", "Doris", "Emil")
PLACES = ("attic", "cellar", "stable", "library", "workshop", "terrace")
THINGS = ("lantern", "hammer", "violin", "kettle")
OPPOSITES = {"north": "south", "south": "north", "east": "west", "west": "east"}


class Question(NamedTuple):
    """A question about a story."""

    text: str
    answer: str
    candidates: Sequence[str]
    """Answers to questions of the same kind."""
    needed: frozenset[int]
    """Numbers of the sentences that determine the answer."""


class Stay(NamedTuple):
    """A place where a thing has been."""

    place: str
    needed: frozenset[int]
    """Numbers of the sentences that tell so."""


@dataclass
class World:
    """Persons who walk, and take, drop and hand over things. Records every event as a sentence."""

    rng: np.random.Generator
    sentences: list[str] = field(default_factory=list)
    at: dict[str, Stay] = field(default_factory=dict)
    """Where each person is."""
    holders: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Who holds a thing, and the sentence that tells so."""
    stays: dict[str, list[Stay]] = field(default_factory=dict)
    """The places of each thing that is or was held, in order."""
    gifts: list[tuple[str, str, str, int]] = field(default_factory=list)
    """Giver, thing, receiver and sentence of every gift."""

    def step(self, *, giving: bool) -> None:
        """Let a random person do something that is possible."""
        person = self._pick(PERSONS)
        held = [thing for thing, (holder, _) in self.holders.items() if holder == person]
        chance = self.rng.random()
        if person not in self.at or chance < 0.5:
            self._walk(person, held)
        elif held and giving:
            self._give(person, self._pick(held))
        elif held and chance < 0.6:
            self._drop(person, self._pick(held))
        else:
            self._take(person)

    def _pick(self, names: Sequence[str]) -> str:
        return names[int(self.rng.integers(len(names)))]

    def _tell(self, sentence: str) -> int:
        self.sentences.append(sentence)
        return len(self.sentences) - 1

    def _walk(self, person: str, held: Sequence[str]) -> None:
        before = self.at[person].place if person in self.at else ""
        place = self._pick([place for place in PLACES if place != before])
        number = self._tell(f"{person} went to the {place}.")
        self.at[person] = Stay(place, frozenset({number}))
        for thing in held:
            _, taken = self.holders[thing]
            self.stays[thing].append(Stay(place, frozenset({number, taken})))

    def _take(self, person: str) -> None:
        place = self.at[person].place
        there = [
            thing
            for thing in THINGS
            if thing not in self.holders
            and (thing not in self.stays or self.stays[thing][-1].place == place)
        ]
        if there:
            thing = self._pick(there)
            number = self._tell(f"{person} picked up the {thing}.")
            self.holders[thing] = person, number
            if thing not in self.stays:
                stay = Stay(place, self.at[person].needed | {number})
                self.stays[thing] = [stay]

    def _drop(self, person: str, thing: str) -> None:
        number = self._tell(f"{person} put down the {thing}.")
        last = self.stays[thing][-1]
        self.stays[thing][-1] = Stay(last.place, last.needed | {number})
        del self.holders[thing]

    def _give(self, person: str, thing: str) -> None:
        place = self.at[person].place
        present = [
            other
            for other in PERSONS
            if other != person and other in self.at and self.at[other].place == place
        ]
        if present:
            other = self._pick(present)
            number = self._tell(f"{person} handed the {thing} to {other}.")
            self.holders[thing] = other, number
            self.gifts.append((person, thing, other, number))


class Stories(PromptFamily):
    """A story told in sentences between the lines of a text, and a question about it."""

    new_tokens: PositiveInt = 20
    kind: Literal[1, 2, 3, 4, 5] = 1
    events: PositiveInt = 12
    """Number of steps of the world; it takes more if there is no question yet."""

    def write(self, page: Page) -> Prompt:
        """Return a prompt whose haystack is the corpus."""
        rng = page.rng
        shown, example = self._story(rng)
        sentences, asked = self._story(rng)
        opening = page.encode(
            "Sentences of a story are hidden in the text below. Answer the question about them with"
            f" one word.\n\nExample:\n{' '.join(shown)}\n{_question(example)} {example.answer}."
            "\n\nText:\n"
        )
        question = page.encode(f"\n{_question(asked)}")
        lines = page.encode_many([f"\n{sentence}\n" for sentence in sentences])
        room = page.room(opening, question, *lines)
        tokens, spans = page.compose(opening, page.text(room), question, lines)
        needed = np.isin(np.arange(len(lines)), [*asked.needed])
        words = asked.text.rstrip("?").split()
        wrong = [name for name in asked.candidates if name != asked.answer and name not in words]
        return Prompt(
            tokens,
            [asked.answer],
            wrong,
            stop=(".", "\n"),
            question_tokens=len(question),
            spans=spans[needed],
            distractors=spans[~needed],
        )

    def _story(self, rng: np.random.Generator) -> tuple[list[str], Question]:
        """Simulate until there is a question."""
        if self.kind == 4:
            return _map(rng)
        world = World(rng)
        questions: list[Question] = []
        while len(world.sentences) < self.events or not questions:
            world.step(giving=self.kind == 5)
            questions = QUESTIONS[self.kind](world)
        return world.sentences, questions[int(rng.integers(len(questions)))]


def _question(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _map(rng: np.random.Generator) -> tuple[list[str], Question]:
    """Return two sentences about three places, and a question about one of them."""
    first, middle, last = rng.choice(PLACES, 3, replace=False).tolist()
    direction = str(rng.choice([*OPPOSITES]))
    sentences = [
        f"The {first} is {direction} of the {middle}.",
        f"The {middle} is {direction} of the {last}.",
    ]
    order = rng.permutation(2)
    opposite = OPPOSITES[direction]
    options = [
        (f"What is {direction} of the {middle}?", first, 0),
        (f"What is {opposite} of the {middle}?", last, 1),
        (f"What is the {middle} {direction} of?", last, 1),
        (f"What is the {middle} {opposite} of?", first, 0),
    ]
    text, answer, number = options[int(rng.integers(len(options)))]
    needed = frozenset({int(np.flatnonzero(order == number)[0])})
    return [sentences[place] for place in order], Question(text, answer, PLACES, needed)


def _persons(world: World) -> list[Question]:
    return [
        Question(f"Where is {person}?", stay.place, PLACES, stay.needed)
        for person, stay in world.at.items()
    ]


def _things(world: World) -> list[Question]:
    """Questions about things that have been moved."""
    return [
        Question(f"Where is the {thing}?", stays[-1].place, PLACES, stays[-1].needed)
        for thing, stays in world.stays.items()
        if len(stays) > 1
    ]


def _earlier(world: World) -> list[Question]:
    """Questions about things that were in another place before one that they reached once."""
    found = []
    for thing, stays in world.stays.items():
        places = [stay.place for stay in stays]
        found += [
            Question(
                f"Where was the {thing} before it was in the {after.place}?",
                before.place,
                PLACES,
                before.needed | after.needed,
            )
            for before, after in pairwise(stays)
            if places.count(after.place) == 1
        ]
    return found


def _gifts(world: World) -> list[Question]:
    """Questions about gifts, each of which has one answer in the story."""
    found = []
    for giver, thing, receiver, number in world.gifts:
        found += [
            Question(text, answer, candidates, frozenset({number}))
            for text, answer, candidates, alike in (
                (
                    f"Who handed the {thing} to {receiver}?",
                    giver,
                    PERSONS,
                    [gift for gift in world.gifts if gift[1:3] == (thing, receiver)],
                ),
                (
                    f"What did {giver} hand to {receiver}?",
                    thing,
                    THINGS,
                    [gift for gift in world.gifts if gift[::2] == (giver, receiver)],
                ),
                (
                    f"To whom did {giver} hand the {thing}?",
                    receiver,
                    PERSONS,
                    [gift for gift in world.gifts if gift[:2] == (giver, thing)],
                ),
            )
            if len(alike) == 1
        ]
    return found


QUESTIONS = {1: _persons, 2: _things, 3: _earlier, 5: _gifts}
"""Returns all questions of a kind that a world allows."""
