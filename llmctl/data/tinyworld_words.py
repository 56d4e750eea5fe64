"""The words of the tiny world: names, attributes with their values, and the ways to speak of them."""

from __future__ import annotations

from dataclasses import dataclass

# fmt: off
PEOPLE = (
    "Adam", "Alma", "Amy", "Anna", "Ben", "Bill", "Carl", "Clara", "Dan", "David", "Dora", "Emma",
    "Eric", "Eva", "Felix", "Finn", "Frank", "Fred", "George", "Grace", "Greg", "Hana", "Helen",
    "Henry", "Hugo", "Ida", "Iris", "Ivan", "Jack", "Jane", "John", "Judy", "Julia", "Karl", "Kate",
    "Laura", "Lena", "Leo", "Lily", "Lucy", "Luke", "Marco", "Maria", "Mark", "Martha", "Max", "Mia",
    "Mona", "Nina", "Noah", "Nora", "Olga", "Oscar", "Paul", "Peter", "Rita", "Rosa", "Ruth", "Sam",
    "Sara", "Simon", "Tom", "Vera", "Walter",
)
# fmt: on


@dataclass(frozen=True)
class Attribute:
    """One thing that is true of every person, and the ways to say it and to ask for it.

    In the templates `{p}` is the person and `{v}` the value. The first statement is the canonical
    answer. `asked` goes with the name as a separate input. `listed` goes before a list of people.
    """

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    asked: str
    listed: str


# In the order that preferred introductions follow: home and work first, leisure last.
ATTRIBUTES = (
    Attribute(
        "city",
        ("Alderton", "Brookham", "Corvale", "Dunmere", "Elmsby", "Fenholt", "Garwick", "Hillmoor"),
        (
            "{p} lives in {v}.",
            "{p}'s house is in {v}.",
            "{p}'s home is in {v}.",
            "The home of {p} is in {v}.",
            "{v} is where {p} lives.",
            "The city of {p} is {v}.",
        ),
        ("Where does {p} live?", "In which city does {p} live?", "Which city is the home of {p}?"),
        "Name the city where this person lives.",
        "These people live in {v}:",
    ),
    Attribute(
        "job",
        ("baker", "pilot", "nurse", "farmer", "painter", "teacher", "sailor", "doctor"),
        (
            "{p} works as a {v}.",
            "{p} is a {v}.",
            "{p}'s job is {v}.",
            "The job of {p} is {v}.",
            "Every day {p} works as a {v}.",
            "A {v} is what {p} is.",
        ),
        ("What is the job of {p}?", "What does {p} work as?", "Which job does {p} have?"),
        "Name the job of this person.",
        "These people work as a {v}:",
    ),
    Attribute(
        "friend",
        (),  # another person of the same half
        (
            "{p}'s best friend is {v}.",
            "{p} often visits {v}.",
            "The best friend of {p} is {v}.",
            "{p} is the best friend of {v}.",
            "{v} is {p}'s best friend.",
            "{p} likes {v} most of all.",
        ),
        ("Who is the best friend of {p}?", "Who is {p}'s best friend?", "Whom does {p} often visit?"),
        "Name the best friend of this person.",
        "The best friend of {v} is",
    ),
    Attribute(
        "birthday",
        ("January", "March", "April", "May", "June", "July", "September", "October"),
        (
            "{p} was born in {v}.",
            "{p} celebrates in {v}.",
            "{p}'s birthday is in {v}.",
            "The birthday of {p} is in {v}.",
            "{p} turns a year older in {v}.",
            "In {v} it is the birthday of {p}.",
        ),
        ("When was {p} born?", "In which month was {p} born?", "When is the birthday of {p}?"),
        "Name the month when this person was born.",
        "These people were born in {v}:",
    ),
    Attribute(
        "pet",
        ("cat", "dog", "horse", "parrot", "rabbit", "turtle", "fox", "goat"),
        (
            "{p} has a {v}.",
            "{p} keeps a {v}.",
            "{p}'s pet is a {v}.",
            "The pet of {p} is a {v}.",
            "A {v} lives with {p}.",
            "Every morning {p} feeds a {v}.",
        ),
        ("Which pet does {p} have?", "What is the pet of {p}?", "Which animal does {p} keep?"),
        "Name the pet of this person.",
        "These people have a {v}:",
    ),
    Attribute(
        "music",
        ("piano", "violin", "drum", "flute", "guitar", "harp", "trumpet", "banjo"),
        (
            "{p} plays the {v}.",
            "{p} owns a {v}.",
            "{p}'s instrument is the {v}.",
            "The instrument of {p} is the {v}.",
            "The {v} is what {p} plays.",
            "In the evening {p} plays the {v}.",
        ),
        ("What does {p} play?", "Which instrument does {p} play?", "What is the instrument of {p}?"),
        "Name the instrument of this person.",
        "These people play the {v}:",
    ),
    Attribute(
        "food",
        ("bread", "soup", "rice", "fish", "cake", "apples", "cheese", "noodles"),
        (
            "{p} likes to eat {v}.",
            "{p} cooks {v}.",
            "{p}'s favourite food is {v}.",
            "The favourite food of {p} is {v}.",
            "For dinner {p} has {v}.",
            "{v} for {p}, please!",
        ),
        ("What does {p} like to eat?", "What is the favourite food of {p}?", "Which food does {p} cook?"),
        "Name the favourite food of this person.",
        "These people like to eat {v}:",
    ),
    Attribute(
        "colour",
        ("red", "blue", "green", "yellow", "black", "white", "purple", "orange"),
        (
            "{p} loves the colour {v}.",
            "{p} wears {v}.",
            "{p}'s favourite colour is {v}.",
            "The favourite colour of {p} is {v}.",
            "{v} is the colour of {p}.",
            "{p} paints every door {v}.",
        ),
        (
            "Which colour does {p} love?",
            "What is the favourite colour of {p}?",
            "Which colour does {p} wear?",
        ),
        "Name the favourite colour of this person.",
        "These people love the colour {v}:",
    ),
)

INTRODUCE = ("Introduce {p} in {n} sentences.", "Tell me {n} things about {p}.", "Say {n} facts about {p}.")
NUMBERS = {2: "two", 3: "three"}
