"""Shared fixtures: one engine for the whole session, the pocket model in Hugging Face, small random models on disk."""

from __future__ import annotations

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(name, value)

import shutil  # noqa: E402
import socket  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from steer import pocket  # noqa: E402
from steer.engine import Engine  # noqa: E402
from steer.fingerprint import Fingerprint, fingerprint  # noqa: E402
from steer.model import load  # noqa: E402
from steer.vector import SteeringVector  # noqa: E402

if TYPE_CHECKING:
    from steer.server.promotions import Promotions


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The pocket model, served once. Tests that change its weights put them back."""
    with Engine(pocket.MODEL, eager=True) as made:
        yield made


@pytest.fixture(scope="session")
def hf() -> tuple[Any, Any]:
    """(pocket model in float32, tokenizer)."""
    return load(pocket.MODEL)


@pytest.fixture(scope="session")
def pocket_print() -> Fingerprint:
    """The pocket model's fingerprint."""
    return fingerprint(pocket.MODEL)


@pytest.fixture(scope="session")
def served(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Promotions]]:
    """(address, promotions) of a server on a folder of its own; promotions train a few steps only."""
    import uvicorn

    from steer.server import promotions as promotions_module
    from steer.server.app import create_app
    from steer.server.promotions import Promotions
    from steer.store.vectors import VectorStore
    from train.distill import DistillConfig
    from ui.serve import mount

    data = tmp_path_factory.mktemp("data")
    shutil.copytree(pocket.VECTORS, data / "vectors")
    made, vectors = Promotions(engine, data), VectorStore(data / "vectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotions_module, "DistillConfig", lambda **k: DistillConfig(**({"steps": 6, "batch": 8} | k)))
        patch.setattr(promotions_module, "PROOF_PROMPTS", 20)
        app = create_app(engine, made, vectors)
        mount(app, engine, made, vectors)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        end = time.monotonic() + 30
        while not server.started and time.monotonic() < end:
            thread.join(0.1)
        yield f"http://127.0.0.1:{port}", made
        made.close()
        server.should_exit = True
        thread.join(10)
    if engine.weights_path != str(pocket.MODEL):
        engine.update_weights(pocket.MODEL)


def random_vector(print_: Fingerprint, layers: tuple[int, ...], size: float, seed: int = 0) -> SteeringVector:
    """A vector of random directions with separation `size`."""
    rng = np.random.default_rng(seed)
    directions = {}
    for layer in layers:
        d = rng.standard_normal(print_.width).astype(np.float32)
        directions[layer] = d / np.linalg.norm(d)
    return SteeringVector(directions, dict.fromkeys(layers, size), print_, name=f"random-{seed}")


def make_model(family: str, folder: Path) -> Path:
    """A small random bfloat16 model of a family, with the pocket tokenizer, saved to `folder`."""
    import transformers as t

    from steer.pocket.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    gdn: dict[str, Any] = {
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    }  # fmt: skip
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    families: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config, {}),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, {}),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig, {"sliding_window": 512, "query_pre_attn_scalar": 64}),
        "qwen3-moe": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig, experts),
        "qwen3-next": (
            t.Qwen3NextForCausalLM, t.Qwen3NextConfig, gdn | experts | {"shared_expert_intermediate_size": 64, "tie_word_embeddings": False},  # vLLM ties none here
        ),
    }  # fmt: skip
    torch.manual_seed(1)
    model, config, more = families[family]
    model(config(**(shape | more))).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
