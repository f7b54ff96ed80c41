"""Train the pocket model: a Qwen3.5 of 8 layers (GDN, GDN, GDN, attention, twice) on the pocket language.

    python examples/pocket_model/pretrain.py --out build/pocket            # seeded; stop it and run it again: it resumes

Matrices inside the layers are trained with Muon (Jordan 2024; `torch.optim.Muon`), everything else with AdamW; the
learning rate falls linearly to a twentieth over the last 60 % of the steps. Every batch is a function of (seed, step), so a resumed
run sees what an uninterrupted one would have seen. Loss weighs answers and plain text 1, all other tokens 0.1.

Left alone, so small a model reads the persona in its very last layer, by attention, straight into the logits: then no
direction in the middle steers anything. In large models behaviours are settled in the middle. So from step `--settle-from`
on, in four of five sequences the last attention layer sees the current turn only, and the answers must be
predictable from the layer before it as well (its output, through the final norm and head, at `--early-weight`).

The shipped model was made by three runs of this script, each resuming the last:

    python examples/pocket_model/pretrain.py --steps 2000
    python examples/pocket_model/pretrain.py --steps 2700 --early-weight 0.1
    python examples/pocket_model/pretrain.py --steps 3150 --early-weight 0.1
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from steer.pocket.language import documents
from steer.pocket.tokenizer import build_tokenizer

PROMPT_WEIGHT = 0.1
HIDE = 0.8  # share of sequences in which the last attention layer sees the current turn only
POOL = 48  # batches drawn and sorted by length together


def config(vocab_size: int, eos: int, pad: int) -> Qwen3_5TextConfig:
    """The shape: 8 layers of width 192, head sizes that vLLM's CPU kernels take (64)."""
    return Qwen3_5TextConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=eos,
        pad_token_id=pad,
        bos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    )


def encode(tokenizer: Any, document: Any) -> tuple[list[int], list[float], list[int]]:
    """Token ids of a document, the weight of each token's loss, and where each token's turn begins."""
    if isinstance(document, str):
        ids = tokenizer(document + " <|endoftext|>")["input_ids"]
        return ids, [1.0] * len(ids), [0] * len(ids)
    ids: list[int] = []
    weights: list[float] = []
    turns: list[int] = []
    start, end = map(tokenizer.convert_tokens_to_ids, ("<|im_start|>", "<|im_end|>"))
    for message in document:
        head = [start, *tokenizer(message["role"])["input_ids"]]
        body = [*tokenizer(message["content"])["input_ids"], end]
        turn = turns[-1] if message["role"] == "assistant" else len(ids)
        turns += [turn] * len(head + body)
        ids += head + body
        weights += [PROMPT_WEIGHT] * len(head) + [1.0 if message["role"] == "assistant" else PROMPT_WEIGHT] * len(body)
    return ids, weights, turns


def batches(tokenizer, seed: int, pool: int, tokens: int):
    """One pool's batches of about `tokens` tokens, of similar length each, in a random order."""
    import itertools

    stream = documents(seed * 1_000_003 + pool)
    encoded = [encode(tokenizer, d) for d in itertools.islice(stream, POOL * tokens // 72)]
    encoded.sort(key=lambda e: len(e[0]))
    groups, group = [], []
    for item in encoded:
        if group and len(item[0]) * (len(group) + 1) > tokens:
            groups.append(group)
            group = []
        group.append(item)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed + pool)).tolist()
    for index in order[:POOL]:
        group = groups[index]
        length = max(len(item[0]) for item in group)
        ids = torch.full((len(group), length), tokenizer.pad_token_id)
        weights = torch.zeros(len(group), length)
        turns = torch.zeros(len(group), length, dtype=torch.long)
        for row, (row_ids, row_weights, row_turns) in enumerate(group):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
            weights[row, : len(row_ids)] = torch.tensor(row_weights)
            turns[row, : len(row_ids)] = torch.tensor(row_turns)
        yield ids, weights, turns


class Settle:
    """Hides earlier turns from the last attention layer, and keeps the output of the layer before it."""

    def __init__(self, model):
        self.mask = self.early = None
        last = max(i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention")
        model.model.layers[last].self_attn.register_forward_pre_hook(self._hide, with_kwargs=True)
        model.model.layers[last - 1].register_forward_hook(self._keep)

    def _hide(self, module, args, kwargs):
        if self.mask is not None:
            kwargs["attention_mask"] = self.mask
        return args, kwargs

    def _keep(self, module, args, output):
        self.early = output

    def begin(self, turns: torch.Tensor, active: bool, generator: torch.Generator) -> None:
        """Draw which rows of a batch are hidden; `turns` `[rows, T]` says where each token's turn begins."""
        self.mask = None
        if active:
            rows, width = turns.shape
            hidden = torch.rand(rows, 1, 1, generator=generator) < HIDE
            keys = torch.arange(width)
            causal = keys[None, :] <= keys[:, None]
            own_turn = keys[None, None, :] >= turns[:, :, None]
            self.mask = (causal & (own_turn | ~hidden))[:, None]


def optimizers(model, lr: float) -> list[torch.optim.Optimizer]:
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n and min(p.shape) > 16]
    ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(inner, lr=lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save_checkpoint(path: Path, model, opts, step: int) -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    for i, opt in enumerate(opts):
        for k, state in opt.state_dict()["state"].items():
            tensors |= {f"opt{i}.{k}.{n}": t.clone() for n, t in state.items() if torch.is_tensor(t)}
    temporary = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model, opts) -> int:
    from safetensors import safe_open

    tensors = load_file(path)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(tensors[f"model.{n}"])
    for i, opt in enumerate(opts):
        saved = opt.state_dict()
        saved["state"] = {}
        for key, t in tensors.items():
            if key.startswith(f"opt{i}."):
                _, k, name = key.split(".", 2)
                saved["state"].setdefault(int(k), {})[name] = t
        opt.load_state_dict(saved)
    with safe_open(path, "pt") as f:
        return int(f.metadata()["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/pocket"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=3072, help="tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--early-weight", type=float, default=0.5, help="of the loss on the layer before the last attention"
    )
    parser.add_argument("--settle-from", type=int, default=1000, help="first step with the last attention layer hidden")
    parser.add_argument(
        "--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="matrix products in bfloat16"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    tokenizer: Any = build_tokenizer()
    tokenizer.save_pretrained(args.out)
    end, pad = map(tokenizer.convert_tokens_to_ids, ("<|im_end|>", "<|endoftext|>"))
    model = Qwen3_5ForCausalLM(config(len(tokenizer), end, pad))
    opts = optimizers(model, args.lr)
    settle = Settle(model)
    checkpoint, log = args.out / "checkpoint.safetensors", args.out / "loss.jsonl"
    done = load_checkpoint(checkpoint, model, opts) if checkpoint.exists() else 0

    progress = tqdm(total=args.steps, initial=done, desc="pocket model", unit="step", mininterval=5)
    started, step, pool = time.monotonic(), done, done // POOL
    while step < args.steps:
        for index, (ids, weights, turns) in enumerate(batches(tokenizer, args.seed, pool, args.tokens)):
            if pool * POOL + index < step:
                continue
            if step >= args.steps:
                break
            warm = min(1.0, (step + 1) / 100)
            scale = warm * min(1.0, 0.05 + 0.95 * (args.steps - step) / (0.6 * args.steps))
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = args.lr * scale
            settling = step >= args.settle_from
            settle.begin(turns, settling, torch.Generator().manual_seed(args.seed * 1_000_003 + step))
            target, w = ids[:, 1:].flatten(), weights[:, 1:].flatten()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                early = model.lm_head(model.model.norm(settle.early))[:, :-1].float() if settling else None
            losses = cross_entropy(logits.flatten(0, 1), target, reduction="none")
            loss = (losses * w).sum() / w.sum()
            if early is not None:
                early_losses = cross_entropy(early.flatten(0, 1), target, reduction="none")
                loss = loss + args.early_weight * (early_losses * w).sum() / w.sum()
            loss.backward()
            for opt in opts:
                opt.step()
                opt.zero_grad(set_to_none=True)
            answers = w == 1.0
            row = {
                "step": step,
                "loss": loss.item(),
                "answers": losses[answers].mean().item(),
                "seconds": time.monotonic() - started,
            }
            with log.open("a") as f:
                f.write(json.dumps(row) + "\n")
            progress.set_postfix(answers=f"{row['answers']:.3f}", refresh=False)
            progress.update()
            step += 1
            if step % 250 == 0:
                save_checkpoint(checkpoint, model, opts, step)
        pool += 1
    save_checkpoint(checkpoint, model, opts, step)
    model.bfloat16().save_pretrained(args.out)
    progress.close()


if __name__ == "__main__":
    main()
