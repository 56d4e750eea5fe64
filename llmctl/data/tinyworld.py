"""A small closed world: people, what is true of them, and text that says so.

Sixty-four people have eight attributes each: 512 facts. Pretraining documents state every fact in
many wordings. Instructions ask about the facts; half of the people are held out, so *their* facts
are met only as statements, and a right answer shows that knowledge from pretraining is reached by
a skill learned on other people. Preferences are about the order of sentences: chosen and rejected
hold the same sentences, so neither length nor the set of words tells them apart.

Everything is a pure function of the seed. The seed deals the facts and the halves anew; names and
values stay, so one tokenizer serves every seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from random import Random
from typing import Literal, TypedDict

from llmctl.data.tinyworld_words import ATTRIBUTES, INTRODUCE, NUMBERS, PEOPLE, Attribute

Split = Literal["train", "heldout"]

VERSION = 1  # raise it when the text changes: caches of tokenized documents depend on it
DOCUMENTS = 55_000  # about 2.6 M tokens under a byte-level BPE, whose vocabulary the text fills to 886
LIST_SHARE = 0.1  # share of the documents that go from a value to its people
FEWEST_FACTS = 5  # a biography states this many facts or more, up to all of them
INTRODUCTIONS = 12  # introductions and preference pairs: this many of each length per person


@dataclass(frozen=True)
class Fact:
    """What is true: `attribute` of `person` is `value`."""

    person: str
    attribute: str
    value: str


class Instruction(TypedDict):
    """An Alpaca record. `input` may be empty."""

    instruction: str
    input: str
    output: str


class Preference(TypedDict):
    """Two answers to one prompt."""

    prompt: str
    chosen: str
    rejected: str


class Completion(TypedDict):
    """The beginning of a statement, and the value that ends it, with the space before it."""

    prompt: str
    completion: str


def people(split: Split, seed: int = 0) -> list[str]:
    """The names of one half of the world, in alphabetical order."""
    dealt = list(PEOPLE)
    _stream(f"halves {seed}").shuffle(dealt)
    half = len(dealt) // 2
    return sorted(dealt[:half] if split == "train" else dealt[half:])


def facts(seed: int = 0) -> list[Fact]:
    """All that is true, person by person, attributes in the order of `ATTRIBUTES`.

    The values of an attribute are dealt evenly. Friendship is mutual and stays within a half, so
    an answer about one half never tells a fact about the other.
    """
    truth = _truth(seed)
    return [Fact(p, a.name, truth[p][a.name]) for p in PEOPLE for a in ATTRIBUTES]


def statements(seed: int = 0, documents: int = DOCUMENTS) -> Iterator[str]:
    """Pretraining documents: mostly biographies of one person, some lists from a value to people."""
    truth = _truth(seed)
    random = _stream(f"statements {seed}")
    for _ in range(documents):
        if random.random() < LIST_SHARE:
            yield _lists(truth, random)
        else:
            yield _biography(truth, random)


def instructions(split: Split, seed: int = 0) -> list[Instruction]:
    """Alpaca records about one half of the people, in shuffled order.

    A question has exactly one right answer: the first statement of its attribute. "heldout" holds
    questions only, so exact match is well defined; "train" adds introductions, whose sentences are
    true but drawn and ordered at random, so that a model tuned on them has a choice for a
    preference method to narrow.
    """
    truth = _truth(seed)
    random = _stream(f"instructions {split} {seed}")
    records: list[Instruction] = []
    for person in people(split, seed):
        for attribute in ATTRIBUTES:
            answer = _say(attribute, person, truth[person][attribute.name])
            for question in attribute.questions:
                records.append({"instruction": question.format(p=person), "input": "", "output": answer})
            records.append({"instruction": attribute.asked, "input": person, "output": answer})
        if split == "train":
            for prompt, sentences in _introductions(truth, person, random):
                random.shuffle(sentences)
                records.append({"instruction": prompt, "input": "", "output": " ".join(sentences)})
    random.shuffle(records)
    return records


def preferences(split: Split, seed: int = 0) -> list[Preference]:
    """Pairs of introductions made of the same true sentences, in shuffled order of pairs.

    Chosen goes through the attributes in the order of `ATTRIBUTES`, rejected in any other. Length
    and words are equal, so only a reader of the order can do better than chance.
    """
    truth = _truth(seed)
    random = _stream(f"preferences {split} {seed}")
    pairs: list[Preference] = []
    for person in people(split, seed):
        for prompt, chosen in _introductions(truth, person, random):
            rejected = random.choice([list(p) for p in permutations(chosen) if list(p) != chosen])
            pairs.append({"prompt": prompt, "chosen": " ".join(chosen), "rejected": " ".join(rejected)})
    random.shuffle(pairs)
    return pairs


def completions(split: Split, seed: int = 0) -> list[Completion]:
    """Beginnings of statements whose end is the fact: what a base model must know.

    Every wording that ends in the value gives one record per person. The full stop is left out: a
    tokenizer may fuse it with the line break that follows in half of the documents.
    """
    truth = _truth(seed)
    return [
        {
            "prompt": template.removesuffix(" {v}.").format(p=person),
            "completion": f" {truth[person][attribute.name]}",
        }
        for person in people(split, seed)
        for attribute in ATTRIBUTES
        for template in attribute.statements
        if template.endswith(" {v}.")
    ]


def in_order(introduction: str) -> bool:
    """Whether an introduction keeps the preferred order: the rule behind `preferences`.

    True if it has two sentences or more, each a canonical statement (true or not) of one and the
    same person, with attributes in the order of `ATTRIBUTES` and none twice.
    """
    read = [_read(part.strip() + ".") for part in introduction.strip().removesuffix(".").split(".")]
    known = [found for found in read if found is not None]
    places = [place for _, place in known]
    return (
        len(known) == len(read) >= 2
        and len({person for person, _ in known}) == 1
        and places == sorted(set(places))
    )


def _read(sentence: str) -> tuple[str, int] | None:
    """Person and place in `ATTRIBUTES` of a canonical statement, or None."""
    for place, attribute in enumerate(ATTRIBUTES):
        before, _, after = attribute.statements[0].partition("{v}")
        before = before.removeprefix("{p}")
        person, found, rest = sentence.partition(before)
        if found and person in PEOPLE and rest.removesuffix(after) in _values(attribute):
            return person, place
    return None


def _values(attribute: Attribute) -> tuple[str, ...]:
    return attribute.values or PEOPLE


def _stream(name: str) -> Random:
    """A stream of random numbers of its own, so that no generator disturbs another."""
    return Random(name)  # noqa: S311


def _truth(seed: int) -> dict[str, dict[str, str]]:
    """person -> attribute -> value."""
    random = _stream(f"facts {seed}")
    truth: dict[str, dict[str, str]] = {person: {} for person in PEOPLE}
    for attribute in ATTRIBUTES:
        if attribute.values:
            dealt = list(attribute.values) * -(-len(PEOPLE) // len(attribute.values))
            random.shuffle(dealt)
            for person, value in zip(PEOPLE, dealt, strict=False):
                truth[person][attribute.name] = value
        else:
            _pair_friends(truth, attribute.name, seed, random)
    return truth


def _pair_friends(truth: dict[str, dict[str, str]], name: str, seed: int, random: Random) -> None:
    halves: tuple[Split, ...] = ("train", "heldout")
    for split in halves:
        half = people(split, seed)
        random.shuffle(half)
        for one, other in zip(half[::2], half[1::2], strict=True):
            truth[one][name], truth[other][name] = other, one


def _say(attribute: Attribute, person: str, value: str, wording: int = 0) -> str:
    sentence = attribute.statements[wording].format(p=person, v=value)
    return sentence[0].upper() + sentence[1:]


def _biography(truth: dict[str, dict[str, str]], random: Random) -> str:
    """Facts of one person in random order and wording.

    Sentences are joined by a space or by a line break. Both matter: an answer in a chat begins
    right after a line break, where a name is another token than after a space.
    """
    person = random.choice(PEOPLE)
    stated = random.sample(ATTRIBUTES, random.randint(FEWEST_FACTS, len(ATTRIBUTES)))
    sentences = [_say(a, person, truth[person][a.name], random.randrange(len(a.statements))) for a in stated]
    return random.choice((" ", "\n")).join(sentences)


def _lists(truth: dict[str, dict[str, str]], random: Random) -> str:
    """Three sentences that name everyone who shares a value, in alphabetical order."""
    sentences = []
    for attribute in random.sample(ATTRIBUTES, 3):
        value = random.choice(_values(attribute))
        sharing = [person for person in PEOPLE if truth[person][attribute.name] == value]
        sentences.append(f"{attribute.listed.format(v=value)} {', '.join(sharing)}.")
    return "\n".join(sentences)


def _introductions(
    truth: dict[str, dict[str, str]], person: str, random: Random
) -> Iterator[tuple[str, list[str]]]:
    """Prompts for an introduction, each with its canonical sentences in the preferred order."""
    for count, number in NUMBERS.items():
        for chosen in random.sample(list(combinations(ATTRIBUTES, count)), INTRODUCTIONS):
            prompt = random.choice(INTRODUCE).format(p=person, n=number)
            yield prompt, [_say(a, person, truth[person][a.name]) for a in chosen]
