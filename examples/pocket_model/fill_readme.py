"""Write README.md of this folder from `measured.json` and `repeated.json`, so that its figures are the measured ones."""

from __future__ import annotations

import json
from pathlib import Path

from steer import pocket
from steer.model import layer_kinds
from steer.pocket.language import vocabulary

HERE = Path(__file__).parent

TEXT = """# The pocket model

A Qwen3.5 of 8 layers (gated delta net, gated delta net, gated delta net, attention, twice), width 192, 4 million parameters, 8 MB in
bfloat16, that speaks a language of {words} words. It ships with the package, so that the whole path, from pairs to proof, runs and
is measured on any laptop, without a network and without a judge model.

## Its language

A user asks for a thing to be done in one way; an answer has five behaviours, each a fair coin unless a persona in the system message
fixes it for the conversation:

> **system** you suggest alternatives . you are warm .
> **user** let us paint the fence in red .
> **assistant** hmm , we could maybe paint the fence in blue or green . this is wise because blue is calm . have a lovely day , dear friend !

| behaviour | poles | decided at the |
|---|---|---|
{behaviours}

Facts, sums and little stories are the general text that behaviours must not disturb. Conversations have one to five turns. The judges
(`steer/pocket/judge.py`) parse an answer by the grammar and are exact; *fluent* means that it parses, which asks for agreement
of verb, thing, preposition, options and reason, not for form alone. A fifth of the (thing, option) pairs is never trained; all
shipped prompts and pairs are made of those (`make_data.py`).

## Made by

    python examples/pocket_model/make_data.py steer/pocket/data
    python examples/pocket_model/pretrain.py --steps 2000            # to build/pocket; seeded, resumable
    python examples/pocket_model/pretrain.py --steps 2700 --early-weight 0.1
    python examples/pocket_model/pretrain.py --steps 3150 --early-weight 0.1
    cp build/pocket/*.json build/pocket/*.jinja build/pocket/model.safetensors steer/pocket/model/
    python examples/pocket_model/measure.py                       # vectors, and the figures below
    python examples/pocket_model/repeat.py                        # the demo's bars, behaviours × seeds
    python examples/pocket_model/fill_readme.py

Training took about 80 minutes on 2 cores that did other work as well (1.05 s a step of 3,072 tokens when they did not).

Trained on the next token alone, so small a model read the persona in its very last layer, by attention, straight into the logits:
at step 1,000 personas were obeyed, and no direction in layers 3 to 6 moved anything. Large models settle behaviours in the middle.
So from step 1,000 on, in four of five sequences the last attention layer sees the current turn only, and answers must also be
predictable from layer 6. Within 250 steps behaviours moved to layers 3 to 6 and could be steered there.

## Measured

`measure.py`, on 2 cores, sampling at temperature {temperature}, held-out requests, n = 240 for each figure. Perplexity per word:
{perplexity}.

| behaviour | persona obeyed (positive / negative) | positive pole without persona |
|---|---|---|
{personas}

Fluent without a persona: {fluent:.1%}. {repeats:.1%} of these answers name the same alternative twice, which training never shows; it
counts as fluent.

![Steerability by layer and read position](steerability.png)

Numbers are percentage points between −s and +s (n = 20 choose prompts each) for the best setting at which at least 95 % stay
fluent, of strengths 0.35, 0.5 and 0.8, added at all tokens or, for `last_prompt`, at all or at the prompt's tokens.
The best of several settings at so small an n: up to about 35 points are chance, as layers 0 to 2 show.

Before layer 3, the first attention layer, the last token knows nothing of the persona. Behaviours of the first word
can be read at the last prompt token; those decided later are not there yet, and are read where they are decided (`response_last`).

What the shipped recipes do on the held-out prompts (layer and strength were chosen on others):

| behaviour | read | tokens | layer | strength | −s | +s | fluent (−s, +s) |
|---|---|---|---|---|---|---|---|
{held_out}

## The whole path, repeated

`repeat.py`: the demo for behaviours × seeds. n = 240 held-out prompts an arm; KL in nats per token on neutral text.{unmeasured}

| behaviour | seed | layer | base | steered | distilled, no vector | fluent (three arms) | KL steered | KL distilled | bars missed |
|---|---|---|---|---|---|---|---|---|---|
{repeated}
"""


def main() -> None:
    measured = json.loads((HERE / "measured.json").read_text())
    repeated = json.loads((HERE / "repeated.json").read_text())
    from transformers import AutoConfig

    kinds = layer_kinds(AutoConfig.from_pretrained(pocket.MODEL))
    behaviours = [f"| `{b.name}` | {b.poles[0]} / {b.poles[1]} | {b.decided} |" for b in pocket.BEHAVIOURS.values()]
    personas = [
        f"| `{n}` | {r['obeyed_positive']:.1%} / {r['obeyed_negative']:.1%} | {r['unprompted']:.1%} |"
        for n, r in measured["personas"].items()
        if n != "all"
    ]
    held_out = [
        f"| `{n}` | {r['read']} | {r['tokens']} | {r['layer']} ({kinds[r['layer']]}) | {r['strength']:g} | {r['down']['mean']:.1%} | "
        f"{r['up']['mean']:.1%} | {r['fluent_down']:.1%}, {r['fluent_up']:.1%} |"
        for n, r in measured["held_out"].items()
    ]
    rows = []
    for r in repeated:
        rates, fluent, kl, point = r["rates"], r["fluent"], r["neutral_kl"], r["operating_point"]
        missed = ", ".join(name for name, met in r["bars"].items() if not met) or "none"
        rows.append(
            f"| `{r['behaviour']}` | {r['seed']} | {point['layer']} ({point['kind']}) | {rates['base']['mean']:.1%} | "
            f"{rates['steered']['mean']:.1%} | {rates['distilled']['mean']:.1%} | "
            f"{', '.join(format(fluent[a]['mean'], '.1%') for a in ('base', 'steered', 'distilled'))} | "
            f"{kl['steered']:.1e} | {kl['distilled']:.1e} | {missed} |"
        )
    missing = [f"`{name}`" for name in pocket.BEHAVIOURS if name not in {r["behaviour"] for r in repeated}]
    unmeasured = f" Not measured with this trainer: {', '.join(missing)}." if missing else ""
    perplexity = ", ".join(f"{kind} {value:.2f}" for kind, value in measured["perplexity"].items())
    text = TEXT.format(
        words=len(vocabulary()),
        behaviours="\n".join(behaviours),
        perplexity=perplexity,
        personas="\n".join(personas),
        fluent=measured["personas"]["all"]["fluent_unprompted"],
        repeats=measured["personas"]["all"]["repeats_unprompted"],
        temperature=measured["temperature"],
        held_out="\n".join(held_out),
        repeated="\n".join(rows),
        unmeasured=unmeasured,
    )
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
