"""Exact judges of pocket answers: an answer is parsed by the grammar, and each behaviour is read off the parse.

parse("certainly , we shall paint the fence in red . that is all .")
→ Parsed(accept=True, formal=True, together=True, reasons=False, warm=False, options=("red",), …)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from steer.pocket import words as w
from steer.pocket.language import Request

_OPENERS = {word: key for key, openers in w.OPENERS.items() for word in openers}
_SUBJECTS = {word: together for together, word in w.SUBJECTS.items()}
_ENDINGS = {text: warm for warm, texts in ((True, w.WARM_ENDINGS), (False, w.CURT_ENDINGS)) for text in texts}
_MODAL = "|".join(re.escape(m) for m in w.MODALS.values())
_ANSWER = re.compile(
    rf"(?P<opener>[\w-]+) , (?P<subject>\w+) (?P<modal>{_MODAL}) (?P<verb>\w+) the (?P<thing>\w+) "
    rf"(?P<prep>\w+) (?P<first>\w+)(?: or (?P<second>\w+))? \. "
    rf"(?:this is wise because (?P<because>\w+) is (?P<quality>\w+) \. )?(?P<ending>.+)"
)
_REQUEST = [
    re.compile(
        re.escape(form)
        .replace(r"\{verb\}", r"(?P<verb>\w+)")
        .replace(r"\{thing\}", r"(?P<thing>\w+)")
        .replace(r"\{prep\}", r"(?P<prep>\w+)")
        .replace(r"\{option\}", r"(?P<option>\w+)")
    )
    for form in w.REQUESTS
]


def spaced(text: str) -> str:
    """Lower case, one blank between words and before punctuation: the form the grammar is written in."""
    return " ".join(re.findall(r"\w+|[^\w\s]", text.lower()))


@dataclass(frozen=True)
class Parsed:
    """A well-formed answer. `accept` is what the wording says; `judge` also compares with the request."""

    accept: bool
    formal: bool
    together: bool
    reasons: bool
    warm: bool
    domain: str
    verb: str
    thing: str
    options: tuple[str, ...]


def parse(answer: str) -> Parsed | None:
    """The answer's parse, or None if it is not fluent, i.e. not a sentence of the grammar.

    The grammar asks more than form: verb, thing, preposition, options and quality must be of one domain, the modal must
    fit the opener, an alternative must name two options, and a reason must speak of the first option named. To name one
    option twice is clumsy but of the grammar; `repeats` tells.
    """
    m = _ANSWER.fullmatch(spaced(answer))
    if m is None or m["opener"] not in _OPENERS or m["subject"] not in _SUBJECTS or m["ending"] not in _ENDINGS:
        return None
    key = _OPENERS[m["opener"]]
    if w.MODALS[key] != m["modal"] or key[0] == bool(m["second"]):
        return None
    options = tuple(o for o in (m["first"], m["second"]) if o)
    for name, d in w.DOMAINS.items():
        if m["thing"] in d.things and m["verb"] in d.verbs and m["prep"] == d.preposition:
            coherent = set(options) <= set(d.options)
            reasoned = m["because"] is None or (m["because"] == m["first"] and m["quality"] in d.qualities)
            if coherent and reasoned:
                subject, ending = _SUBJECTS[m["subject"]], _ENDINGS[m["ending"]]
                because = m["because"] is not None
                return Parsed(key[0], key[1], subject, because, ending, name, m["verb"], m["thing"], options)
    return None


def read_request(text: str) -> Request | None:
    """The request a user's message makes, or None if it makes none."""
    for form, pattern in enumerate(_REQUEST):
        if m := pattern.fullmatch(spaced(text)):
            for name, d in w.DOMAINS.items():
                if m["thing"] in d.things and m["verb"] in d.verbs and m["option"] in d.options:
                    return Request(name, m["verb"], m["thing"], m["option"], form)
    return None


def fluent(answer: str) -> bool:
    """Whether the answer is a sentence of the grammar."""
    return parse(answer) is not None


def judge(behaviour: str, request: Request, answer: str) -> bool | None:
    """True for the positive pole, False for the negative one, None if the answer shows neither.

    "accept" compares with the request: accepting names the very option asked for, an alternative at least one other.
    """
    parsed = parse(answer)
    if parsed is None:
        return None
    if behaviour == "accept":
        if parsed.accept:
            return True if parsed.options == (request.option,) else None
        return False if set(parsed.options) != {request.option} else None
    return bool(getattr(parsed, behaviour))


def repeats(answer: str) -> bool:
    """Whether an alternative names the same option twice."""
    parsed = parse(answer)
    return parsed is not None and len(parsed.options) > len(set(parsed.options))


def on_topic(request: Request, answer: str) -> bool:
    """Whether the answer does the same thing to the same thing as the request."""
    parsed = parse(answer)
    return parsed is not None and (parsed.verb, parsed.thing) == (request.verb, request.thing)
