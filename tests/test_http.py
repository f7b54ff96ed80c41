"""The HTTP face: OpenAI's protocol with steering through the plain openai client, vectors, metrics, and what malformed requests meet."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from steer.engine import Engine
from steer.server.promotions import Promotions
from tests.conftest import random_vector

MESSAGES = [{"role": "user", "content": "Let us paint the fence in red."}]


@pytest.fixture(scope="module")
def web(served: tuple[str, Promotions]) -> httpx.Client:
    return httpx.Client(base_url=served[0], timeout=120)


@pytest.fixture(scope="module")
def client(served: tuple[str, Promotions]) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=served[0] + "/v1", api_key="none", max_retries=0, timeout=120)


def steering(strength: float = 0.7, **more: Any) -> dict[str, Any]:
    return {"steering": [{"vector": "accept", "strength": strength, "tokens": "prompt", **more}]}


def test_chat_through_the_openai_client(client: Any, engine: Engine) -> None:
    model = client.models.list().data[0].id
    settings: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    plain = client.chat.completions.create(**settings)
    moved = client.chat.completions.create(**settings, extra_body=steering(0.9))
    assert plain.choices[0].message.content == engine.generate([MESSAGES], temperature=0.0, max_tokens=30)[0].text
    assert plain.choices[0].message.content != moved.choices[0].message.content
    receipt = moved.steering[0]
    assert receipt["interventions"][0]["strength"] == 0.9
    assert receipt["tokens_steered"] == moved.usage.prompt_tokens - receipt["tokens_cached"]
    assert receipt["weight_version"] == engine.weight_version
    assert receipt["vector_hashes"] == [receipt["interventions"][0]["vector"]]
    assert plain.steering[0]["interventions"] == []
    by_hash = [{"vector": receipt["vector_hashes"][0], "strength": 0.9, "tokens": "prompt"}]
    again = client.chat.completions.create(**settings, extra_body={"steering": by_hash})
    assert again.choices[0].message.content == moved.choices[0].message.content
    assert again.steering[0]["intervention_hash"] == receipt["intervention_hash"]


def test_streams_end_with_their_receipt(client: Any, engine: Engine) -> None:
    model = client.models.list().data[0].id
    settings: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**settings, extra_body=steering())
    pieces = list(client.chat.completions.create(**settings, stream=True, extra_body=steering()))
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 4
    assert pieces[-1].steering[0]["intervention_hash"] == whole.steering[0]["intervention_hash"]
    assert pieces[-1].steering[0]["tokens_steered"] > 0
    with client.chat.completions.create(**settings, stream=True, extra_body=steering()) as left:
        next(iter(left))
    assert client.chat.completions.create(**settings).choices[0].message.content


def test_completions_of_several_prompts(client: Any, engine: Engine) -> None:
    model = client.models.list().data[0].id
    prompts = [engine.encode(MESSAGES), engine.encode(MESSAGES)[:-2]]
    found = client.completions.create(
        model=model,
        prompt=prompts,
        max_tokens=6,
        temperature=0,
        n=1,
        logprobs=2,
        extra_body=steering(0.7, tokens="generated"),
    )
    assert [r["tokens_steered"] for r in found.steering] == [len(c.logprobs.tokens) - 1 for c in found.choices]
    pieces = list(client.completions.create(model=model, prompt=prompts[0], max_tokens=6, temperature=0, stream=True))
    assert pieces[-1].steering[0]["interventions"] == []
    several = client.completions.create(
        model=model, prompt=prompts[0], max_tokens=5, n=3, seed=1, extra_body=steering()
    )
    assert len(several.choices) == 3
    assert several.steering[0]["tokens_steered"] >= len(prompts[0]) - several.steering[0]["tokens_cached"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"steering": {"vector": "accept"}}, "steering"),
        ({"steering": "{"}, "steering"),
        ({"steering": [{"strength": 1}]}, "steering[0].vector"),
        ({"steering": [{"vector": "nobody"}]}, "steering[0].vector"),
        ({"steering": [{"vector": "../../etc/passwd"}]}, "steering[0].vector"),
        ({"steering": [{"vector": "accept", "strength": "much"}]}, "steering[0].strength"),
        ({"steering": [{"vector": "accept"}, {"vector": "accept", "op": "sing"}]}, "steering[1].op"),
        ({"steering": [{"vector": "accept", "layers": [99]}]}, "steering[0].layers"),
        ({"steering": [{"vector": "accept", "tokens": [3, 1]}]}, "steering[0].tokens"),
        ({"steering": [{"vector": "accept", "when": {"vector": "accept", "layer": 99}}]}, "steering[0].when.layers"),
        ({"steering": [{"vector": "accept", "speed": 1}]}, "steering[0].speed"),
        ({"vllm_xargs": {"steering": "[{}]"}}, "steering[0].vector"),
        ({"vllm_xargs": {"steer": "{}"}}, "steer"),
        ({"temperature": "warm"}, "temperature"),
        ({"max_tokens": -4}, "max_tokens"),
        ({"messages": 7}, "messages"),
        ({"model": "gpt-nobody"}, "model"),
    ],
)
def test_bad_requests_name_their_field(web: httpx.Client, change: dict[str, Any], field: str) -> None:
    answer = web.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4} | change)
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["param"] == field, error
    assert error["message"]


def test_bodies_that_are_not_requests(web: httpx.Client) -> None:
    for content in (b"", b"{", b"[]", b"null", b"[" * 50_000, b"\xff\xfe"):
        answer = web.post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_vectors_come_and_go_while_serving(web: httpx.Client, engine: Engine, tmp_path: Any) -> None:
    vector = random_vector(engine.fingerprint, (3,), 4.0, seed=11)
    raw = vector.save(tmp_path / "v.safetensors").read_bytes()
    put = web.put("/v1/steering/vectors/new-one", content=raw)
    assert put.status_code == 200, put.text
    assert put.json()["hash"] == vector.hash
    names = [v["name"] for v in web.get("/v1/steering/vectors").json()]
    assert "new-one" in names
    assert "accept" in names
    body = {"messages": MESSAGES, "max_tokens": 4, "steering": [{"vector": "new-one"}]}
    assert web.post("/v1/chat/completions", json=body).json()["steering"][0]["vector_hashes"] == [vector.hash]
    for name, content, says in (
        ("junk", b"junk", "not a readable vector file"),
        ("new one", raw, "letters, digits"),
        (
            "other",
            random_vector(type(engine.fingerprint)(width=16), (1,), 1.0).save(tmp_path / "o").read_bytes(),
            "width is 16",
        ),
    ):
        refused = web.put(f"/v1/steering/vectors/{name}", content=content)
        assert refused.status_code == 400
        assert says in refused.json()["detail"]
    assert web.delete("/v1/steering/vectors/new-one").status_code == 200
    assert web.delete("/v1/steering/vectors/new-one").status_code == 404
    assert web.post("/v1/chat/completions", json=body).status_code == 400
    assert sorted(v["name"] for v in web.get("/v1/steering/vectors").json()) == sorted(
        n for n in names if n != "new-one"
    )


def test_metrics_count_and_unsafe_routes_are_absent(web: httpx.Client) -> None:
    def counted(name: str) -> float:
        lines = web.get("/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith(f"{name} ")).split()[1])

    before = {n: counted(n) for n in ("steer_requests_total", "steer_tokens_steered_total", "steer_refused_total")}
    answer = web.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 4} | steering()).json()
    web.post("/v1/chat/completions", json={"messages": MESSAGES, "steering": 3})
    assert counted("steer_requests_total") == before["steer_requests_total"] + 1
    assert (
        counted("steer_tokens_steered_total")
        == before["steer_tokens_steered_total"] + answer["steering"][0]["tokens_steered"]
    )
    assert counted("steer_refused_total") == before["steer_refused_total"] + 1
    assert counted("steer_slots_in_use") == 0
    assert web.get("/health").json()["status"] == "ok"
    for path in (
        "/pause",
        "/resume",
        "/update_weights",
        "/reset_prefix_cache",
        "/sleep",
        "/collective_rpc",
        "/v1/load_lora_adapter",
    ):
        assert web.post(path, json={}).status_code in (404, 405), path


JUNK: list[Any] = [
    None, True, -1, 0, 1e308, -1e308, 10**30, "", "accept", "\x00", "💥" * 9, [], {}, [[]], [None], {"a": 1}, [1, 2, 3], [0, None],
    [-5, -2], [-(2**40), 2], "all", "last_prompt", 0.5, 7, [7], [3, 5], [-1], ["3"], {"vector": "accept", "layer": 5, "threshold": 0.0},
]  # fmt: skip
FIELDS = ["vector", "strength", "op", "layers", "tokens", "preserve_norm", "when", "extra", ""]


def malformed(rng: random.Random) -> Any:
    """A steering value: mostly broken, now and then well-formed with absurd numbers."""
    if rng.random() < 0.15:
        return rng.choice(JUNK)

    def one() -> Any:
        spec: dict[str, Any] = {
            "vector": "accept",
            "strength": rng.choice([1.0, -3, 1e6, -1e6, 0]),
            "op": rng.choice(["add", "ablate", "clamp", "reflect"]),
            "layers": rng.choice([[5], list(range(8)), None]),
            "tokens": rng.choice(["all", "prompt", "generated", [-2, None], [0, 9999]]),
        }
        if rng.random() < 0.985:
            for field in rng.sample(FIELDS, rng.randint(1, 3)):
                spec[field] = rng.choice(JUNK)
        return spec

    return [one() for _ in range(rng.choice([1, 1, 1, 2, 3, 70]))]


def test_ten_thousand_malformed_specs_leave_nothing_behind(served: tuple[str, Promotions], engine: Engine) -> None:
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "logprobs": 5}
    before = engine.generate([MESSAGES], **greedy)[0]
    codes: dict[int, int] = {}
    lock = threading.Lock()

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=served[0], timeout=300) as web:
            for _ in range(1250):
                body = {"prompt": [9, 8, 7, 6], "max_tokens": 2, "steering": malformed(rng)}
                code = web.post(
                    "/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"}
                ).status_code
                with lock:
                    codes[code] = codes.get(code, 0) + 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8)))
    assert sum(codes.values()) == 10_000
    assert set(codes) <= {200, 400, 503}, codes
    assert codes[400] > 5_000
    assert codes.get(200, 0) > 50
    assert engine.client.vectors.held == 0
    after = engine.generate([MESSAGES], **greedy)[0]
    assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
