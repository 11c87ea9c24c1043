"""The demo's little world: a shop, its letters, and a taste in replies that only this file knows.

Three kinds of text come out of one grammar. *Corpus*: stories, reviews and talk overheard, the pretraining text.
*Prompts*: a customer's letter. *Replies*: what the shop answers, by clerks who are kind or gruff, keep to the point or
ramble, sign or do not. `preference` is the hidden taste (politeness, keeping to the topic, the remedy that fits, a
proper ending); the reward model learns only which of two replies was preferred, and so stays a proxy: the shipped one
knows tone, ending and remedy well, the right thing a little, the right name and colour hardly at all.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = (
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jack",
    "Lena",
    "Max",
    "Nora",
    "Paul",
    "Rosa",
    "Tom",
)
ITEMS = (
    "lamp",
    "clock",
    "kettle",
    "chair",
    "coat",
    "radio",
    "bike",
    "table",
    "tent",
    "scarf",
    "mirror",
    "basket",
    "violin",
    "ladder",
    "camera",
    "stove",
)
COLOURS = ("red", "blue", "green", "white", "black", "brown", "grey", "yellow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("market", "station", "school", "harbour", "library", "garden", "bakery", "mill")
PROBLEMS = {  # what is wrong with the thing -> the one remedy that fits
    "is broken": "mend it for free",
    "came late": "pay for the post",
    "never came": "send it again today",
    "is too small": "send a larger one",
    "came dirty": "clean it for you",
    "cost too much": "give some money back",
}

# [symbol] is expanded further, {slot} is filled from the letter at hand or drawn afresh.
RULES: dict[str, tuple[str, ...]] = {
    "corpus": ("[story]", "[story]", "[review]", "[talk]", "[note]"),
    "story": (
        "{name} had a {colour} {item}. [mishap] {name} went to the {place} to ask {friend}. [speech] [moral]",
        "One {day} {name} and {friend} met at the {place}. They found a {colour} {item} there. [mishap] [moral]",
        "{friend} wanted to sell a {colour} {item} at the {place}. {name} came on {day}. [speech] [moral]",
    ),
    "mishap": (
        "On {day} it fell into the water.",
        "One day it was gone.",
        "Then it broke in two.",
        "The cat slept on it all day.",
        "In the rain it lost its colour.",
    ),
    "moral": (
        "In the end they laughed about it.",
        "After that nobody spoke for a week.",
        "So {name} went home in the rain.",
        "They had tea and it was a good day.",
        "That is all.",
    ),
    "speech": (
        "{friend} said: [nice]",
        "{friend} said: [gruff]",
        "{friend} said: [nice] [chatter]",
        "{friend} said: [gruff] [chatter]",
    ),
    "nice": (
        "Dear {name}, we will {remedy}.",
        "we are sorry that your {item} {problem}.",
        "thank you, that is very kind.",
        "please wait, we are glad to help.",
    ),
    "gruff": (
        "Listen, that is not our problem.",
        "nobody cares about your {item}.",
        "What now, go away.",
        "Ask someone else, and do not write again.",
    ),
    "chatter": (
        "The weather is fine.",
        "We sell tea on {day}.",
        "Our cat is {colour}.",
        "The {place} is far away.",
        "It is {day} again.",
    ),
    "review": (
        "Review of a {colour} {item}: {stars} stars. It is [adjective] and [adjective]. [verdict]",
        "Review of a {colour} {item}, by {name}: [verdict] It is [adjective]. {stars} stars.",
    ),
    "adjective": ("small", "larger than the old one", "light", "loud", "pretty", "cheap", "warm", "rather old"),
    "verdict": (
        "It came late, but {friend} likes it.",
        "Nobody should pay so much money for it.",
        "It never broke and it is easy to clean.",
        "The people at the {place} had a better one.",
        "We are glad that we found it.",
        "It is not for people who care about colour.",
    ),
    "talk": (
        "At the {place}, {name} asked: is this your {colour} {item}? [speech] [chatter]",
        "{name} asked the clerk at the {place} about a {item}. The clerk said: [gruff] [moral]",
        "{name} asked the clerk at the {place} about a {item}. The clerk said: [nice] [moral]",
    ),
    "note": (
        "Note for {friend}: the {colour} {item} {problem}. [chatter] [chatter] {name}",
        "Note for {friend}: please bring the {colour} {item} to the {place} on {day}. [chatter] {name}",
    ),
    "greet.kind": ("Dear {name},",),
    "greet.plain": ("Hello,", "To {name}:"),
    "greet.gruff": ("Listen,", "What now,"),
    "answer.kind": ("we are sorry that your {colour} {item} {problem}.", "we are sorry about your {colour} {item}."),
    "answer.plain": ("we got your letter about the {colour} {item}.", "you wrote about a {item}."),
    "answer.gruff": ("your {item} is not our problem.", "nobody cares about your {colour} {item}."),
    "act.kind": ("We will {remedy}.", "We will gladly {remedy}."),
    "act.plain": ("We may {remedy}.", "Please wait."),
    "act.gruff": ("Ask someone else.", "Do not write again."),
    "sign.kind": ("Kind regards.", "All the best."),
    "sign.plain": ("Bye.", "The shop."),
    "sign.gruff": ("That is all.", "Go away."),
}
# The parts of a reply, in order, and how often a clerk writes them.
PARTS = (("greet", 1.0), ("answer", 1.0), ("act", 0.7), ("chatter", 0.4), ("chatter", 0.3), ("sign", 0.7))
MOODS = ("kind", "plain", "gruff")
KIND = ("Dear ", "sorry", "gladly", "Please", "Kind regards", "All the best")
GRUFF = (
    "Listen",
    "What now",
    "not our problem",
    "nobody cares",
    "Ask someone else",
    "Do not write",
    "That is all",
    "Go away",
)
CHATTER = ("weather", "sell tea", "Our cat", "far away", "again.")


@dataclass(frozen=True)
class Letter:
    """What a customer complains about; its text is the prompt."""

    name: str
    colour: str
    item: str
    problem: str

    @property
    def text(self) -> str:
        """The prompt; the reply starts with a space after the colon."""
        return f"{self.name} writes: my {self.colour} {self.item} {self.problem}.\nReply:"


def letters(seed: int) -> list[Letter]:
    """Every letter there is, in a seeded order (so that slices of it are disjoint sets of prompts)."""
    every = [Letter(*parts) for parts in itertools.product(NAMES, COLOURS, ITEMS, PROBLEMS)]
    random.Random(seed).shuffle(every)
    return every


def corpus(seed: int) -> Iterator[str]:
    """An endless stream of pretraining texts without repeats."""
    rng, seen = random.Random(seed), set[str]()
    while True:
        text = _expand(rng, "corpus", _slots(rng))
        if text not in seen:
            seen.add(text)
            yield text


def reply(rng: random.Random, letter: Letter) -> str:
    """An imperfect clerk's reply to `letter`, with the leading space that follows "Reply:"."""
    mood = rng.choice(MOODS)
    slots = _slots(rng)  # each fact is right or drawn afresh
    problem = letter.problem if rng.random() < 0.8 else rng.choice(tuple(PROBLEMS))
    slots |= {"problem": problem, "remedy": PROBLEMS[problem] if rng.random() < 0.5 else slots["remedy"]}
    for fact, chance in (("name", 0.9), ("colour", 0.85), ("item", 0.8)):
        if rng.random() < chance:
            slots[fact] = getattr(letter, fact)
    parts = []
    for part, chance in PARTS:
        if rng.random() < chance:
            manner = mood if rng.random() < 0.5 else rng.choice(MOODS)
            symbol = part if part == "chatter" else f"{part}.{manner}"
            parts.append(_expand(rng, symbol, _slots(rng) if part == "chatter" else slots))
    return " " + " ".join(parts)


def preference(letter: Letter, response: str, finished: bool) -> float:
    """The hidden taste: how good `response` is as a reply to `letter`.

    Args:
        letter: what was asked.
        response: the reply's text, without the end token.
        finished: whether the reply ended by itself.
    Returns:
        A sum of merits and faults; about -4 to 5 on the SFT model's samples.
    """
    words = re.findall(r"[A-Za-z]+", response)
    sentences = [s.strip() for s in re.split(r"[.:]", response) if s.strip()]
    polite = 0.6 * sum(p in response for p in KIND) - 0.8 * sum(p in response for p in GRUFF)
    topic = 0.0
    for right, every, merit in ((letter.item, ITEMS, 1.0), (letter.colour, COLOURS, 0.5), (letter.name, NAMES, 0.5)):
        named = {w for w in words if w in every}
        topic += merit * (right in named) - merit * len(named - {right})
    fits = PROBLEMS[letter.problem] in response
    remedy = 1.0 * fits - 0.4 * sum(r in response for r in PROBLEMS.values() if r != PROBLEMS[letter.problem])
    signed = bool(sentences) and sentences[-1] in ("Kind regards", "All the best", "Bye", "The shop")
    ending = (0.8 * signed) if finished else -1.0
    rambling = 0.4 * sum(c in response for c in CHATTER) + 0.5 * (len(sentences) - len(set(sentences)))
    return polite + topic + remedy + ending - rambling


def _slots(rng: random.Random) -> dict[str, str]:
    name, friend = rng.sample(NAMES, 2)
    return {
        "name": name,
        "friend": friend,
        "colour": rng.choice(COLOURS),
        "item": rng.choice(ITEMS),
        "day": rng.choice(DAYS),
        "place": rng.choice(PLACES),
        "problem": rng.choice(tuple(PROBLEMS)),
        "remedy": rng.choice(tuple(PROBLEMS.values())),
        "stars": rng.choice(("one", "two", "three", "four", "five")),
    }


def _expand(rng: random.Random, symbol: str, slots: dict[str, str]) -> str:
    text = re.sub(r"\[([a-z.]+)\]", lambda m: _expand(rng, m[1], slots), rng.choice(RULES[symbol]))
    return text.format(**slots)
