"""Token scopes: which tokens of a request an intervention acts on.

Positions count from 0 over all the tokens of a request: the prompt as the chat template renders it, with all its turns, then the
answer. So a scope means the same whether the prompt comes in one piece or in chunks, from a cache or not, and earlier
assistant turns are prompt. A generated token is one that was sampled and is fed back; the last sampled one never is.

| scope | positions, for a prompt of n tokens |
|---|---|
| `all` | 0 … |
| `prompt` | 0 … n − 1 |
| `generated` | n … |
| `last_prompt` | n − 1 |
| `(start, end)` | start … end − 1; end None: no end; negative numbers count back from the end of the prompt (−1 = n − 1) |
"""

from __future__ import annotations

from typing import Any

from steer.errors import InterventionError

Scope = str | tuple[int, int | None]
SCOPES = ("all", "prompt", "generated", "last_prompt")
NO_END = 2**31 - 1


def parse_scope(given: Any) -> Scope:
    """The scope a name or a pair means, in its one canonical form.

    Raises:
        InterventionError: neither a known name nor a span, or a span that can never hold a token.
    """
    if isinstance(given, str):
        if given not in SCOPES:
            raise InterventionError(
                f'unknown token scope "{given}": choose from {", ".join(SCOPES)} or a span [start, end]', "tokens"
            )
        return given
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise InterventionError(f"a token scope is a name or a span [start, end], not {given!r}", "tokens")
    start, end = given
    start = 0 if start is None else start
    for bound in (start, end):
        if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int) or abs(bound) >= NO_END):
            raise InterventionError(f"the bounds of a span are whole numbers, not {bound!r}", "tokens")
    if end is not None and (start < 0) == (end < 0) and start >= end:
        raise InterventionError(f"the span [{start}, {end}] holds no token: its end is not after its start", "tokens")
    if end == 0:
        raise InterventionError(
            f"the span [{start}, 0] holds no token; leave the end out to reach the end of the answer", "tokens"
        )
    return "all" if (start, end) == (0, None) else (start, end)


def positions_of(scope: Scope, prompt: int) -> tuple[int, int]:
    """Half-open range of positions that a scope covers for a prompt of `prompt` tokens; empty where start >= end."""
    if isinstance(scope, str):
        return {
            "all": (0, NO_END),
            "prompt": (0, prompt),
            "generated": (prompt, NO_END),
            "last_prompt": (max(0, prompt - 1), prompt),
        }[scope]
    start, end = scope
    return (
        max(0, prompt + start) if start < 0 else start,
        NO_END if end is None else max(0, prompt + end) if end < 0 else end,
    )


def needs_prompt_length(scope: Scope) -> bool:
    """Whether the positions depend on where the prompt ends."""
    if isinstance(scope, str):
        return scope != "all"
    return scope[0] < 0 or (scope[1] is not None and scope[1] < 0)
