"""The three skills of the small model: what it is trained on, and the questions that it is asked.

    python accuracy/questions.py

writes accuracy/tasks/*.jsonl. Of every skill a share of all questions is never trained on, by their checksum.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import zlib
from collections.abc import Iterator
from pathlib import Path

LETTERS = string.ascii_lowercase
UNKNOWN, END = "<unk>", "<end>"
VOCABULARY = [UNKNOWN, END, *string.digits, *LETTERS, *"+=>?"]
"""One token a character; END closes every answer."""

QUESTIONS = 400
HELD_OUT_SHARE = 8
"""Of so many questions one is held out."""

_facts = random.Random(0)
FACTS = {letter: _facts.choices(string.digits, k=10) for letter in LETTERS}
"""What the model has to know by heart: of each letter a digit for each of ten topics."""

RARITY = [0.6**digit for digit in range(10)]
"""How often a digit occurs where each needs knowledge of its own. The model is less sure of the rare ones, so
a path that computes a little worse shows there first.
"""


def arithmetic(chance: random.Random) -> tuple[str, str]:
    """Add two numbers, all from the last digit on: 8520+3100= is 17200, for 258 + 13."""
    a, b = ("".join(chance.choices(string.digits, weights, k=4)) for weights in (None, RARITY))
    return f"{a}+{b}=", f"{int(a[::-1]) + int(b[::-1]):05}"[::-1]


def copying(chance: random.Random) -> tuple[str, str]:
    """Repeat twelve letters, each moved 1 to 9 places on in the alphabet: abz2> is cdb."""
    letters, (places,) = chance.choices(LETTERS, k=12), chance.choices(range(1, 10), RARITY[:9])
    moved = [LETTERS[(LETTERS.index(letter) + places) % len(LETTERS)] for letter in letters]
    return "".join(letters) + f"{places}>", "".join(moved)


def recall(chance: random.Random) -> tuple[str, str]:
    """Say what FACTS has of five letters for five topics: kqzam20132? begins with that of k for 2."""
    letters, topics = chance.choices(LETTERS, k=5), chance.choices(range(10), RARITY, k=5)
    digits = [FACTS[letter][topic] for letter, topic in zip(letters, topics, strict=True)]
    return "".join(letters) + "".join(map(str, topics)) + "?", "".join(digits)


SKILLS = {"arithmetic": arithmetic, "copying": copying, "recall": recall}
WEIGHTS = (3, 2, 2)
"""How often each is trained: about equally many tokens."""


def held_out(question: str) -> bool:
    """Whether a question belongs to the test."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


def training(seed: int) -> Iterator[tuple[str, str]]:
    """Endless questions and answers, none held out."""
    chance = random.Random(seed)
    while True:
        (skill,) = chance.choices(list(SKILLS), WEIGHTS)
        question, answer = SKILLS[skill](chance)
        if not held_out(question):
            yield question, answer


def generate(skill: str) -> list[dict[str, str]]:
    """The held-out questions of a skill, all different, always the same."""
    chance, found = random.Random(skill), {}
    while len(found) < QUESTIONS:
        question, answer = SKILLS[skill](chance)
        if held_out(question):
            found[question] = answer
    return [{"question": question, "answer": answer} for question, answer in found.items()]


def read(skill: str) -> list[dict[str, str]]:
    """The questions as they are in the repository."""
    return [json.loads(line) for line in _file(skill).read_text().splitlines()]


def _file(skill: str) -> Path:
    return Path(__file__).parent / f"tasks/{skill}.jsonl"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    for skill in SKILLS:
        _file(skill).write_text("".join(json.dumps(question) + "\n" for question in generate(skill)))
