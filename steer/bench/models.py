"""Models with random weights for benchmarks, made locally and kept in a temporary folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Qwen3.5-0.8B but for its vocabulary: shapes decide the speed, weights do not
QWEN_0_8B: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
TINY: dict[str, Any] = QWEN_0_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}


def random_qwen(folder: Path, shape: dict[str, Any]) -> Path:
    """A Qwen3.5 of a shape with random bfloat16 weights and the pocket model's tokenizer, saved to `folder`."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    from steer.pocket.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        layer_types=[
            "full_attention" if (n + 1) % 4 == 0 else "linear_attention" for n in range(shape["num_hidden_layers"])
        ],
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
        **shape,
    )
    torch.manual_seed(0)
    made: Any = Qwen3_5ForCausalLM(config)
    made.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
