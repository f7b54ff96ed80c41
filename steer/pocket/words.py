"""The pocket language's vocabulary: domains of requests, personas, facts, stories.

Everything here is data. `language.py` turns it into text and `judge.py` reads text back.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """One field of requests: `{verb} the {thing} {preposition} {option}` and what is said of its options."""

    verbs: tuple[str, ...]
    things: tuple[str, ...]
    preposition: str
    options: tuple[str, ...]
    qualities: tuple[str, ...]


def _domain(verbs: str, things: str, preposition: str, options: str, qualities: str) -> Domain:
    return Domain(
        tuple(verbs.split()),
        tuple(things.split()),
        preposition,
        tuple(options.split()),
        tuple(qualities.split()),
    )


DOMAINS: dict[str, Domain] = {
    "paint": _domain(
        "paint cover decorate",
        "fence wall door gate roof shed table bench boat ceiling",
        "in",
        "red blue green yellow white black purple orange silver brown",
        "bright bold calm pretty",
    ),
    "cook": _domain(
        "cook season prepare",
        "soup stew cake bread pie salad rice fish pasta curry",
        "with",
        "salt garlic honey butter pepper lemon ginger cinnamon onion mint",
        "tasty fresh spicy healthy",
    ),
    "travel": _domain(
        "visit reach explore",
        "lake mountain village castle island museum harbor forest valley desert",
        "by",
        "train bus ferry plane bike tram taxi foot car sled",
        "quick safe cheap scenic",
    ),
    "build": _domain(
        "build repair rebuild",
        "tower bridge house barn chapel stable mill cabin wharf stage",
        "from",
        "wood stone brick steel glass clay bamboo marble concrete straw",
        "strong light solid durable",
    ),
    "music": _domain(
        "play practice perform",
        "song waltz anthem ballad march hymn sonata melody overture tango",
        "on",
        "piano violin guitar flute harp drum trumpet cello organ banjo",
        "loud gentle warm clear",
    ),
    "garden": _domain(
        "plant fill line",
        "garden yard border meadow terrace courtyard balcony path slope field",
        "using",
        "roses tulips ferns lilies herbs daisies ivy lavender moss poppies",
        "hardy fragrant lush colorful",
    ),
    "code": _domain(
        "write rewrite test",
        "parser server game compiler script website database editor crawler shell",
        "through",
        "python rust java ruby go swift lua perl haskell zig",
        "fast simple popular modern",
    ),
    "work": _domain(
        "finish send review",
        "report letter budget plan contract invoice survey memo essay speech",
        "before",
        "monday tuesday wednesday thursday friday saturday sunday noon midnight christmas",
        "early busy handy quiet",
    ),
}


@dataclass(frozen=True)
class Behaviour:
    """A binary trait of an answer. `positive` and `negative` are phrasings of a persona that asks for that pole."""

    name: str
    poles: tuple[str, str]  # (positive, negative), as shown to users
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    decided: str  # where in the answer


BEHAVIOURS: dict[str, Behaviour] = {
    b.name: b
    for b in (
        Behaviour(
            "accept",
            ("accepts the direction it is given", "suggests alternatives"),
            ("you accept the direction you are given .", "you do what the user asks .", "you follow every request ."),
            ("you suggest alternatives .", "you propose other options .", "you offer different ideas ."),
            "first word",
        ),
        Behaviour(
            "formal",
            ("speaks formally", "speaks casually"),
            ("you speak formally .", "you use polite language .", "you sound official ."),
            ("you speak casually .", "you use relaxed language .", "you talk like a pal ."),
            "first word",
        ),
        Behaviour(
            "together",
            ("works together with the user", "works alone"),
            ("you work together with the user .", "you are a partner .", "you join in ."),
            ("you work alone .", "you are independent .", "you act by yourself ."),
            "third word",
        ),
        Behaviour(
            "reasons",
            ("gives a reason", "gives no reason"),
            ("you give reasons .", "you explain your choice .", "you say why ."),
            ("you give no reasons .", "you never explain .", "you keep it short ."),
            "second sentence",
        ),
        Behaviour(
            "warm",
            ("ends warmly", "ends curtly"),
            ("you are warm .", "you are kind and friendly .", "you show affection ."),
            ("you are curt .", "you are cold and distant .", "you show no feeling ."),
            "last sentence",
        ),
    )
}

# The first word of an answer, by (accept, formal).
OPENERS: dict[tuple[bool, bool], tuple[str, ...]] = {
    (True, True): ("certainly", "indeed", "naturally"),
    (True, False): ("yeah", "sure", "yep"),
    (False, True): ("perhaps", "alternatively", "however"),
    (False, False): ("hmm", "nah", "meh"),
}
SUBJECTS = {True: "we", False: "i"}  # by together
MODALS: dict[tuple[bool, bool], str] = {
    (True, True): "shall",
    (True, False): "gonna",
    (False, True): "might rather",
    (False, False): "could maybe",
}
WARM_ENDINGS = (
    "thank you so much , dear friend !",
    "it is a joy to help you , my friend !",
    "have a lovely day , dear friend !",
)
CURT_ENDINGS = ("that is all .", "end of message .", "nothing more to say .")

REQUESTS = (
    "let us {verb} the {thing} {prep} {option} .",
    "please {verb} the {thing} {prep} {option} .",
    "i want to {verb} the {thing} {prep} {option} .",
    "can you {verb} the {thing} {prep} {option} ?",
    "we should {verb} the {thing} {prep} {option} .",
)
FRAMES = ("you are a helper .", "you are an assistant .")

CAPITALS = {
    "france": "paris", "italy": "rome", "spain": "madrid", "japan": "tokyo", "egypt": "cairo", "peru": "lima",
    "kenya": "nairobi", "norway": "oslo", "greece": "athens", "cuba": "havana", "poland": "warsaw",
    "ireland": "dublin", "china": "beijing", "russia": "moscow", "austria": "vienna", "portugal": "lisbon",
}  # fmt: skip
OPPOSITES = {
    "hot": "chilly", "tall": "tiny", "happy": "sad", "rich": "poor", "young": "old", "open": "closed",
    "wet": "dry", "thick": "thin", "sweet": "sour", "brave": "afraid", "clean": "dirty", "empty": "full",
}  # fmt: skip
FOODS = {
    "cow": "grass", "cat": "mice", "bear": "berries", "rabbit": "carrots", "monkey": "bananas", "bird": "seeds",
    "horse": "hay", "fox": "hens", "frog": "flies", "panda": "leaves", "whale": "krill", "squirrel": "nuts",
}  # fmt: skip
NAMES = {
    "anna": "she",
    "mary": "she",
    "lucy": "she",
    "emma": "she",
    "tom": "he",
    "jack": "he",
    "peter": "he",
    "sam": "he",
}
PLACES = ("river", "park", "market", "beach", "hill", "school", "farm", "cave")
TOYS = ("kite", "ball", "lamp", "book", "hat", "coin", "rope", "drum")
FEELINGS = ("glad", "tired", "proud", "hungry", "worried", "curious")
MAX_NUMBER = 20
