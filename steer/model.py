"""Hugging Face models: loading, and finding the decoder layers whose output is the block output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steer.errors import ModelError


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: str | None = None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer) of a folder or hub id.

    Raises:
        ModelError: nothing loadable there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    name = str(path)
    if ("/" not in name or name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
        raise ModelError(f"{name}: no such model folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {str(error).splitlines()[0]}") from None
    network: Any = model
    return network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer


def decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    """The model's decoder layers: the `layers` list with as many entries as the text config has hidden layers.

    Raises:
        ModelError: no such list, or several.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.rsplit(".", 1)[-1] in ("layers", "h")
        and len(module) == config.num_hidden_layers
        and "visual" not in name
    ]
    if len(found) != 1:
        raise ModelError(f"{type(model).__name__}: found {len(found)} lists of decoder layers, not one")
    return found[0]


def layer_kinds(config: Any) -> list[str]:
    """ "gdn", "attention" or another kind for each layer, from the text config."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = {"linear_attention": "gdn", "full_attention": "attention", "sliding_attention": "sliding"}
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [names.get(str(kind), str(kind)) for kind in kinds]
