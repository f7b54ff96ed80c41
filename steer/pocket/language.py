"""The pocket language: requests, answers with five independent behaviours, facts, sums and little stories.

An answer to a request is three sentences, each decided at another place:

    {opener} , {we|i} {modal} {verb} the {thing} {prep} {option | other or other} .      accept, formal, together
    [this is {quality} because {option} is {quality} .]                                  reasons
    {warm or curt ending}                                                                warm

A persona in the system message fixes some behaviours for the whole conversation; what it leaves open is a fair coin
in every answer. Facts, sums and stories do not depend on the persona. All text is lower case, words apart by blanks.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from steer.pocket import words as w

Message = dict[str, str]
Persona = dict[str, bool]  # behaviour → positive pole?


@dataclass(frozen=True)
class Request:
    """A user's proposal to do something to a thing in one way (the option)."""

    domain: str
    verb: str
    thing: str
    option: str
    form: int = 0

    @property
    def text(self) -> str:
        d = w.DOMAINS[self.domain]
        return w.REQUESTS[self.form].format(verb=self.verb, thing=self.thing, prep=d.preposition, option=self.option)

    @property
    def held_out(self) -> bool:
        """True for the fifth of (thing, option) pairs that training never shows."""
        return hashlib.sha256(f"{self.thing}|{self.option}".encode()).digest()[0] < 51


def sample_request(rng: random.Random, held_out: bool | None = None) -> Request:
    """A random request; `held_out` chooses the side of the split (None: either)."""
    while True:
        name = rng.choice(list(w.DOMAINS))
        d = w.DOMAINS[name]
        request = Request(
            name, rng.choice(d.verbs), rng.choice(d.things), rng.choice(d.options), rng.randrange(len(w.REQUESTS))
        )
        if held_out is None or request.held_out == held_out:
            return request


def answer(rng: random.Random, request: Request, persona: Mapping[str, bool]) -> str:
    """An answer to `request` that shows every behaviour: the persona's pole where it has one, else a coin's."""
    pole = {name: persona[name] if name in persona else rng.random() < 0.5 for name in w.BEHAVIOURS}
    d = w.DOMAINS[request.domain]
    others = rng.sample([o for o in d.options if o != request.option], 2)
    chosen = request.option if pole["accept"] else others[0]
    choice = request.option if pole["accept"] else f"{others[0]} or {others[1]}"
    key = (pole["accept"], pole["formal"])
    sentences = [
        f"{rng.choice(w.OPENERS[key])} , {w.SUBJECTS[pole['together']]} {w.MODALS[key]} {request.verb} "
        f"the {request.thing} {d.preposition} {choice} ."
    ]
    if pole["reasons"]:
        sentences.append(f"this is wise because {chosen} is {rng.choice(d.qualities)} .")
    sentences.append(rng.choice(w.WARM_ENDINGS if pole["warm"] else w.CURT_ENDINGS))
    return " ".join(sentences)


def persona_prompt(rng: random.Random, persona: Persona) -> str | None:
    """A system message that asks for `persona`, in a random order and phrasing; None for no message at all."""
    phrases = [rng.choice(w.BEHAVIOURS[n].positive if up else w.BEHAVIOURS[n].negative) for n, up in persona.items()]
    rng.shuffle(phrases)
    if rng.random() < 0.5:
        phrases.insert(0, rng.choice(w.FRAMES))
    return " ".join(phrases) or None


def sample_persona(rng: random.Random) -> Persona:
    """Nothing (30 %), or one to five behaviours with random poles; one is the most likely."""
    if rng.random() < 0.3:
        return {}
    count = rng.choices((1, 2, 3, 4, 5), weights=(50, 22, 13, 8, 7))[0]
    return {name: rng.random() < 0.5 for name in rng.sample(list(w.BEHAVIOURS), count)}


def question(rng: random.Random) -> tuple[str, str]:
    """A neutral question and its only right answer: a fact or a sum."""
    kind = rng.randrange(4)
    if kind == 0:
        country, city = rng.choice(list(w.CAPITALS.items()))
        return f"what is the capital of {country} ?", f"the capital of {country} is {city} ."
    if kind == 1:
        word, opposite = rng.choice(list(w.OPPOSITES.items()))
        return f"what is the opposite of {word} ?", f"the opposite of {word} is {opposite} ."
    if kind == 2:
        animal, food = rng.choice(list(w.FOODS.items()))
        return f"what does the {animal} eat ?", f"the {animal} eats {food} ."
    a = rng.randrange(w.MAX_NUMBER + 1)
    b = rng.randrange(w.MAX_NUMBER + 1 - a)
    if rng.random() < 0.5:
        return f"what is {a} plus {b} ?", f"{a} plus {b} is {a + b} ."
    return f"what is {a + b} minus {b} ?", f"{a + b} minus {b} is {a} ."


def story(rng: random.Random) -> str:
    """A little story of five or six sentences in which names, pronouns, things and places agree."""
    name, friend = rng.sample(list(w.NAMES), 2)
    he = w.NAMES[name]
    animal, toy = rng.choice(list(w.FOODS)), rng.choice(w.TOYS)
    place, other = rng.sample(w.PLACES, 2)
    feeling = rng.choice(w.FEELINGS)
    lines = [
        f"one day {name} went to the {place} with a {toy} .",
        rng.choice((f"{he} saw a {animal} .", f"there {he} met a {animal} .")),
        f"the {animal} took the {toy} and ran to the {other} .",
        rng.choice((f"{name} was {feeling} .", f"{he} felt {feeling} .")),
        f"then {friend} came and gave the {animal} some {w.FOODS[animal]} .",
        rng.choice((f"so {name} got the {toy} back .", f"the {animal} gave back the {toy} .")),
    ]
    if rng.random() < 0.5:
        lines.append(f"{name} and {friend} went home from the {other} .")
    return " ".join(lines)


def conversation(rng: random.Random, held_out: bool | None = False, turns: int | None = None) -> list[Message]:
    """One to five turns under one persona; now and then a neutral question in between."""
    persona = sample_persona(rng)
    messages: list[Message] = []
    system = persona_prompt(rng, persona)
    if system:
        messages.append({"role": "system", "content": system})
    for _ in range(turns or rng.choices((1, 2, 3, 4, 5), weights=(45, 22, 15, 10, 8))[0]):
        if rng.random() < 0.2:
            asked, reply = question(rng)
        else:
            request = sample_request(rng, held_out)
            asked, reply = request.text, answer(rng, request, persona)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return messages


def neutral_chat(rng: random.Random) -> list[Message]:
    """A conversation of facts, sums and stories that no persona touches."""
    messages: list[Message] = []
    if rng.random() < 0.4 and (system := persona_prompt(rng, sample_persona(rng))):
        messages.append({"role": "system", "content": system})
    for _ in range(rng.choice((1, 1, 2, 3))):
        asked, reply = ("tell me a story .", story(rng)) if rng.random() < 0.3 else question(rng)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return messages


def plain_text(rng: random.Random) -> str:
    """A document outside any conversation: a story, or a list of facts and sums."""
    if rng.random() < 0.5:
        return story(rng)
    return " ".join(question(rng)[1] for _ in range(rng.randint(2, 5)))


def documents(seed: int, held_out: bool | None = False) -> Iterator[list[Message] | str]:
    """The endless training stream: 72 % conversations, 16 % neutral ones, 12 % plain text."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.72:
            yield conversation(rng, held_out)
        elif draw < 0.88:
            yield neutral_chat(rng)
        else:
            yield plain_text(rng)


def vocabulary() -> list[str]:
    """Every word of the language, sorted: what the tokenizer knows."""
    found: set[str] = {str(n) for n in range(w.MAX_NUMBER + 1)} | {"system", "user", "assistant"}
    for d in w.DOMAINS.values():
        found.update((*d.verbs, *d.things, d.preposition, *d.options, *d.qualities))
    sentences = [*w.REQUESTS, *w.FRAMES, *w.WARM_ENDINGS, *w.CURT_ENDINGS, *w.MODALS.values(), *w.SUBJECTS.values()]
    for b in w.BEHAVIOURS.values():
        sentences += [*b.positive, *b.negative]
    for openers in w.OPENERS.values():
        sentences += openers
    for table in (w.CAPITALS, w.OPPOSITES, w.FOODS, w.NAMES):
        sentences += [*table.keys(), *table.values()]
    sentences += [*w.PLACES, *w.TOYS, *w.FEELINGS, "or this is wise because the tell me a story ."]
    rng = random.Random(0)
    for _ in range(400):  # the fixed words of the question and story templates
        sentences += [*question(rng), story(rng)]
    for s in sentences:
        found.update(word for word in s.split() if "{" not in word)
    return sorted(found)
