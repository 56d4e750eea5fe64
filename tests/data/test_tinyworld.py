"""The tiny world: deterministic, closed, and without short cuts."""

import hashlib
import re
from collections import Counter, defaultdict

import pytest

from llmctl.data import tinyworld
from llmctl.data.tinyworld_words import ATTRIBUTES, PEOPLE

SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def documents():
    return list(tinyworld.statements())


def words_as_written(text):
    return re.findall(r"\w+", text)


def words(text):
    return words_as_written(text.lower())


def wordings():
    """(fact, sentence) for every fact in every wording."""
    attributes = {a.name: a for a in ATTRIBUTES}
    for fact in tinyworld.facts():
        for template in attributes[fact.attribute].statements:
            sentence = template.format(p=fact.person, v=fact.value)
            yield fact, sentence[0].upper() + sentence[1:]


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    for make in (
        lambda seed: list(tinyworld.statements(seed, documents=200)),
        lambda seed: tinyworld.instructions("train", seed),
        lambda seed: tinyworld.instructions("heldout", seed),
        lambda seed: tinyworld.preferences("heldout", seed),
        lambda seed: tinyworld.completions("heldout", seed),
        tinyworld.facts,
    ):
        assert make(0) == make(0)
        assert make(0) != make(1)


def test_the_text_is_the_one_that_version_1_stands_for():
    """Cached tokens are found by VERSION: who changes the text must raise it, then mend this test."""
    text = "\n\n".join(tinyworld.statements(documents=1000))
    assert tinyworld.VERSION == 1
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "35e33a7385c0ae4f"


def test_every_person_has_one_value_of_each_attribute_and_values_are_even():
    facts = tinyworld.facts()
    assert len({(f.person, f.attribute) for f in facts}) == len(facts) == len(PEOPLE) * len(ATTRIBUTES) == 512
    for attribute in ATTRIBUTES:
        shares = Counter(f.value for f in facts if f.attribute == attribute.name)
        assert set(shares.values()) == ({len(PEOPLE) // len(attribute.values)} if attribute.values else {1})


def test_halves_do_not_overlap_and_friends_stay_within_a_half():
    halves = {split: set(tinyworld.people(split)) for split in SPLITS}
    assert halves["train"] | halves["heldout"] == set(PEOPLE)
    assert not halves["train"] & halves["heldout"]
    friends = {f.person: f.value for f in tinyworld.facts() if f.attribute == "friend"}
    for person, friend in friends.items():
        assert friend != person
        assert friends[friend] == person
        assert (person in halves["train"]) == (friend in halves["train"])


def test_every_fact_is_stated_often_and_in_every_wording(documents):
    stated = Counter(s for text in documents for s in re.split(r"(?<=[.!])\s", text))
    by_fact = Counter()
    for fact, sentence in wordings():
        assert stated[sentence] >= 30, sentence
        by_fact[fact] += stated[sentence]
    assert min(by_fact.values()) >= 400


def test_nothing_untrue_is_stated(documents):
    true = {sentence for _, sentence in wordings()}
    biographies = [text for text in documents if ":" not in text]
    assert len(biographies) > 0.85 * len(documents)
    assert {s for text in biographies for s in re.split(r"(?<=[.!])\s", text)} == true


def test_no_question_and_no_template_token_is_in_the_pretraining_text(documents):
    text = "\n".join(documents)
    assert "?" not in text
    assert "<|" not in text
    asked = {r["instruction"] for split in SPLITS for r in tinyworld.instructions(split)}
    others = {question.split()[0] for question in asked if "?" not in question}
    assert others == {"Introduce", "Name", "Say", "Tell"}
    assert not others & set(words_as_written(text))


def test_heldout_questions_have_one_answer_and_share_no_person_with_training():
    heldout = tinyworld.instructions("heldout")
    assert len(heldout) == 1024
    answers = defaultdict(set)
    for record in heldout:
        answers[record["instruction"], record["input"]].add(record["output"])
    assert len(answers) == len(heldout)
    assert all(len(found) == 1 for found in answers.values())
    unseen = set(tinyworld.people("heldout"))
    for record in tinyworld.instructions("train"):
        assert not unseen & set(re.findall(r"[A-Z]\w+", " ".join(record.values())))


def test_training_instructions_hold_questions_and_introductions_in_any_order():
    train = tinyworld.instructions("train")
    introductions = [r for r in train if r["output"].count(".") > 1]
    assert len(train) - len(introductions) == 1024
    assert len(introductions) == 768
    share = sum(tinyworld.in_order(r["output"]) for r in introductions) / len(introductions)
    assert 0.25 < share < 0.42  # a half of the pairs and a sixth of the triples


@pytest.mark.parametrize("split", SPLITS)
def test_preferences_cannot_be_told_by_length_or_words(split):
    """Same sentences on both sides: length and every bag of words or sentences tie on every pair."""
    pairs = tinyworld.preferences(split)
    assert len(pairs) >= 500
    for pair in pairs:
        assert len(pair["chosen"]) == len(pair["rejected"])
        assert Counter(words(pair["chosen"])) == Counter(words(pair["rejected"]))
        assert pair["chosen"] != pair["rejected"]
        assert tinyworld.in_order(pair["chosen"])
        assert not tinyworld.in_order(pair["rejected"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Anna lives in Alderton. Anna has a cat.", True),
        ("Anna has a cat. Anna lives in Alderton.", False),
        ("Anna lives in Alderton.", False),
        ("Anna lives in Alderton. Bill has a cat.", False),
        ("Anna lives in Alderton. Anna lives in Brookham.", False),
        ("Anna lives in Alderton. Anna has a dragon.", False),
        ("Anna lives in Alderton. Anna", False),
        ("", False),
    ],
)
def test_in_order(text, expected):
    assert tinyworld.in_order(text) is expected


@pytest.mark.parametrize("split", SPLITS)
def test_completions_finish_true_statements_in_one_way(split):
    records = tinyworld.completions(split)
    truth = {(f.person, f.value) for f in tinyworld.facts()}
    assert len(records) >= 1000
    assert len({r["prompt"] for r in records}) == len(records)
    for record in records:
        assert any(
            person in record["prompt"] and record["completion"] == f" {value}" for person, value in truth
        )


def test_no_wording_begins_another_so_a_completion_has_one_right_end():
    every = [template for a in ATTRIBUTES for template in a.statements]
    for template in every:
        before, _, after = template.partition("{v}")
        if after == ".":
            assert [t for t in every if t != template and t.startswith(before)] == []
