"""What a model is, in six fields, so that a vector made on one model is never used on another unnoticed.

The weight hash covers name, shape and up to 1,024 evenly spaced values of every tensor, as float32: the same for a
checkpoint folder and for the model loaded from it, and quick at any size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from steer.errors import ModelError

_CONFIG_FIELDS = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "layer_types", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
    "linear_value_head_dim", "tie_word_embeddings", "rms_norm_eps",
)  # fmt: skip
_SAMPLES = 1024


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model and its tokenizer. Empty fields are unknown and agree with everything."""

    architecture: str = ""
    config: str = ""
    weights: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    width: int = 0

    def differences(self, other: Fingerprint) -> list[str]:
        """One phrase for each field that is known on both sides and differs."""
        found = []
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if mine and theirs and mine != theirs:
                found.append(f"{f.name} is {str(mine)[:16]}, the model's is {str(theirs)[:16]}")
        return found


def fingerprint(model: Any) -> Fingerprint:
    """Fingerprint of a path or hub id, a Hugging Face model, or an Engine."""
    if isinstance(model, Fingerprint):
        return model
    if hasattr(model, "fingerprint"):
        found = model.fingerprint
        assert isinstance(found, Fingerprint)
        return found
    if isinstance(model, str | Path):
        return _of_path(str(model))
    return _of_model(model)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _config_fields(config: Any) -> tuple[str, str, int]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = {name: getattr(text, name, None) for name in _CONFIG_FIELDS}
    return text.model_type, _digest(json.dumps(values, sort_keys=True, default=str)), int(text.hidden_size)


def _canonical(name: str) -> str:
    return name.replace("model.language_model.", "model.")


def _weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    lines = []
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step][:_SAMPLES].to("cpu", torch.bfloat16).float().numpy()
        lines.append(f"{_canonical(name)}:{tuple(tensor.shape)}:{hashlib.sha256(sample.tobytes()).hexdigest()}")
    return _digest("\n".join(sorted(lines)))


def _tokenizer_fields(tokenizer: Any) -> tuple[str, str]:
    if tokenizer is None:
        return "", ""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda kv: kv[1]), ensure_ascii=False)
    template = getattr(tokenizer, "chat_template", None)
    return _digest(vocab), _digest(template) if isinstance(template, str) else ""


def _of_model(model: Any) -> Fingerprint:
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    named = ((n, p) for n, p in model.named_parameters() if not (tied and n.startswith("lm_head")))
    architecture, config, width = _config_fields(model.config)
    return Fingerprint(architecture, config, _weights_hash(named), width=width)


def _of_path(path: str) -> Fingerprint:
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no such model: {str(error).splitlines()[0]}") from None
    architecture, config_hash, width = _config_fields(config)
    vocabulary, template = _tokenizer_fields(tokenizer)
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    weights = _weights_hash(_stored_tensors(path, tied))
    return Fingerprint(architecture, config_hash, weights, vocabulary, template, width)


def _stored_tensors(path: str, tied: bool) -> Iterable[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for file in weight_files(path):
        with safe_open(str(file), "pt") as f:
            for name in f.keys():  # noqa: SIM118
                if not (tied and name.startswith("lm_head")) and ".visual." not in name and not name.startswith("mtp"):
                    yield name, f.get_tensor(name)


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a model folder, or of a hub model that is already in the local cache or can be fetched."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        files = sorted(Path(path).glob("model*.safetensors"))
    else:
        index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        if index:
            names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
            files = [Path(str(cached_file(path, name))) for name in names]
        else:
            files = [Path(str(cached_file(path, "model.safetensors")))]
    if not files:
        raise ModelError(f"{path}: holds no model*.safetensors")
    return files
