"""Train the small checkpoints of examples/checkpoints/ from one plain-text file.

The models are Hugging Face `MambaForCausalLM`, `FalconMambaForCausalLM` and `Zamba2ForCausalLM`, trained and saved by
transformers alone: nothing of megatron_ssm_tp takes part, so they are an independent reference for it. A model takes
about a minute on a GPU, the first two with mamba-ssm and causal-conv1d installed: without these transformers falls back
to plain torch, in their case a slow loop over time. The stored Zamba2 model was made in plain torch.

    python tools/train_demo_checkpoints.py --text kjv.txt --out examples/checkpoints
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_text import VOCAB_SIZE, batches, encode, split_held_out, train_tokenizer
from tqdm import tqdm
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Zamba2Config,
    Zamba2ForCausalLM,
)

SAMPLE_PROMPT = "And it came to pass"


@dataclass(frozen=True)
class Architecture:
    """One checkpoint to train: the folder it goes to and the classes and sizes that make it."""

    folder: str
    config: type
    model: type
    layers: int
    hidden_size: int
    tied: bool
    lr: float = 2e-3
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of the config


ARCHITECTURES = {
    "mamba": Architecture("mamba-kjv-2.7m", MambaConfig, MambaForCausalLM, layers=6, hidden_size=240, tied=True),
    "falcon_mamba": Architecture(
        "falcon-mamba-kjv-2.7m", FalconMambaConfig, FalconMambaForCausalLM, layers=5, hidden_size=240, tied=False
    ),
    "zamba2": Architecture(
        "zamba2-kjv-2.9m",
        Zamba2Config,
        Zamba2ForCausalLM,
        layers=6,
        hidden_size=176,
        tied=True,
        lr=4e-3,
        options={
            "layers_block_type": ["linear_attention", "hybrid"] * 3,
            "n_mamba_heads": 8,
            "mamba_d_state": 32,
            "chunk_size": 64,
            "num_attention_heads": 8,
            "intermediate_size": 352,
            "num_mem_blocks": 2,  # the first and the third hybrid layer share one block
            "use_shared_attention_adapter": True,
            "adapter_rank": 8,
            "use_mem_rope": True,
        },
    ),
}


def next_token_loss(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy, in nats a token, of window[:, 1:] given what stands before."""
    logits = model(window[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: torch.nn.Module, stream: torch.Tensor, seq_len: int) -> float:
    """Nats a token over the whole stream, in windows of seq_len that each start from an empty state."""
    model.eval()
    windows = stream[: (len(stream) - 1) // seq_len * seq_len + 1].unfold(0, seq_len + 1, seq_len)
    device = next(model.parameters()).device
    losses = [next_token_loss(model, chunk.to(device)).item() * len(chunk) for chunk in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to a tenth."""
    warmup = max(1, args.steps // 20)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_model(arch: Architecture, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = arch.config(
        vocab_size=VOCAB_SIZE,
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.layers,
        tie_word_embeddings=arch.tied,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **arch.options,
    )
    return arch.model(config)


def train(model: torch.nn.Module, train_part: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> None:
    """AdamW on random windows; matrices decay, the rest (norms, biases, dt_bias, A_log, D) does not."""
    decayed = [p for n, p in model.named_parameters() if p.dim() == 2 and "A_log" not in n]
    kept = [p for n, p in model.named_parameters() if p.dim() != 2 or "A_log" in n]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    device = next(model.parameters()).device
    source = batches(train_part, args.batch_size, args.seq_len, torch.Generator().manual_seed(args.seed))
    model.train()
    progress = tqdm(range(args.steps), disable=None, desc=model.config.model_type)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss = next_token_loss(model, next(source).to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            held = evaluate(model, held_out, args.seq_len)
            tqdm.write(f"{model.config.model_type} step {step + 1} loss {loss.item():.3f} held-out {held:.3f}")


CARD = """---
library_name: transformers
license: apache-2.0
---
# {folder}

A {parameters:.2f} M parameter `{model_type}` model for demonstrations and tests of tensor parallelism. It writes
English in the manner of its one source and knows nothing else.

| | |
|---|---|
| data | King James Bible, plain text (public domain), Genesis to James: {train_tokens:,} tokens |
| held out | 1 Peter to Revelation: {held_tokens:,} tokens |
| tokenizer | byte-level BPE, {vocab_size} entries, trained on the training part |
| size | {layers} layers{hybrid}, hidden {hidden_size}, d_inner {d_inner}, embeddings {tied} |
| training | {steps} steps of {batch_size} x {seq_len} tokens ({epochs:.0f} epochs) |
| optimizer | AdamW, peak rate {lr}, weight decay {weight_decay} |
| held-out loss, stored bfloat16 weights | {held_loss:.3f} nats a token ({bits:.3f} bits a byte), windows of {seq_len} |
| time | {minutes:.1f} min on {hardware} |

`python tools/train_demo_checkpoints.py --text kjv.txt --architectures {name}` makes it anew.

Sample, temperature 0.7, after "{prompt}":

> {sample}
"""


def mixer_width(config: PretrainedConfig) -> int:
    """d_inner; not intermediate_size, which in Zamba2 is the width of the MLP."""
    expand = config.mamba_expand if config.model_type == "zamba2" else config.expand
    return int(expand * config.hidden_size)


def sample_text(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    torch.manual_seed(seed)
    inputs = tokenizer(SAMPLE_PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(
        inputs.input_ids,
        attention_mask=torch.ones_like(inputs.input_ids),
        max_new_tokens=120,
        do_sample=True,
        temperature=0.7,
        top_k=0,
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, card: str) -> None:
    """Write beside the target and swap in at the end: an interrupted run leaves the old checkpoint whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def train_one(name: str, texts: tuple[list[str], list[str]], args: argparse.Namespace) -> None:
    arch = ARCHITECTURES[name]
    args = argparse.Namespace(**{**vars(args), "lr": args.lr or arch.lr})
    tokenizer = train_tokenizer(texts[0])
    train_part, held_out = (encode(tokenizer, part) for part in texts)
    device = torch.device(args.device)
    started = time.monotonic()
    model = make_model(arch, args.seed).to(device)
    train(model, train_part, held_out, args)
    for parameter in model.parameters():  # what is stored is bfloat16, so that is what is evaluated
        parameter.data = parameter.data.to(torch.bfloat16).float()  # buffers, such as rotary frequencies, stay exact
    held_loss = evaluate(model, held_out, args.seq_len)
    held_bytes = sum(len(text.encode()) for text in texts[1])
    hybrid = arch.options.get("layers_block_type", []).count("hybrid")
    card = CARD.format(
        **vars(args),
        name=name,
        folder=arch.folder,
        parameters=model.num_parameters() / 1e6,
        model_type=model.config.model_type,
        train_tokens=len(train_part),
        held_tokens=len(held_out),
        vocab_size=VOCAB_SIZE,
        layers=arch.layers,
        hybrid=f", {hybrid} of them hybrid on {model.config.num_mem_blocks} shared blocks" if hybrid else "",
        hidden_size=arch.hidden_size,
        d_inner=mixer_width(model.config),
        tied="tied" if arch.tied else "untied",
        epochs=args.steps * args.batch_size * args.seq_len / len(train_part),
        held_loss=held_loss,
        bits=held_loss * len(held_out) / held_bytes / math.log(2),
        minutes=(time.monotonic() - started) / 60,
        hardware=torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
        prompt=SAMPLE_PROMPT,
        sample=sample_text(model.eval(), tokenizer, args.seed).replace("\n", "\n> "),
    )
    save(model.to(torch.bfloat16), tokenizer, Path(args.out) / arch.folder, card)
    print(json.dumps({"checkpoint": arch.folder, "held_out_loss": round(held_loss, 4)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="the King James Bible as plain text, chapter headings on lines")
    parser.add_argument("--out", default="examples/checkpoints", help="one folder a model is written below this one")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--lr", type=float, help="peak learning rate; by default the architecture's own")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--eval-every", type=int, default=75)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    texts = split_held_out(Path(args.text).read_text(encoding="utf-8"))
    for name in args.architectures:
        train_one(name, texts, args)


if __name__ == "__main__":
    main()
