"""Small random models of every family on GPUs, against Hugging Face on one of them: logits, tokens, bfloat16's error.

    torchrun --standalone --nproc-per-node 2 tools/check_hybrids.py    # Markdown; docs/hybrids-on-gpus.md is a log

Shapes are such that attention takes torch's variable-length kernel in bfloat16. That kernel is first compared with the
softmax in float32, over pages of a cache, for prompts, parts of prompts and decoding requests at once.
"""

import argparse
import os
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from models import TinyModel, make_tiny

from megatron_ssm_tp import LLM, CacheLimits, SamplingParams, UserError
from megatron_ssm_tp.cli.console import Parser, guarded
from megatron_ssm_tp.ops import attention

SSM = {"mamba_n_heads": 8, "mamba_d_state": 32, "mamba_chunk_size": 64}
HYBRID = {"vocab_size": 1001, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1}
ZAMBA2 = {"n_mamba_heads": 8, "mamba_d_state": 32, "adapter_rank": 16, "chunk_size": 64}
FALCON = SSM | {"mamba_d_ssm": 384, "head_dim": 32}
NEMOTRON = {"head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 32, "chunk_size": 64}
MODELS = {
    "zamba": ("zamba", {"mamba_d_state": 16}),
    "zamba2": ("zamba2", ZAMBA2),
    "zamba2, 2 groups": ("zamba2", ZAMBA2 | {"mamba_ngroups": 2}),
    "bamba": ("bamba", SSM),
    "falcon_h1": ("falcon_h1", FALCON),
    "falcon_h1, norm": ("falcon_h1", FALCON | {"mamba_rms_norm": True}),
    "falcon_h1, norm by 2 groups": ("falcon_h1", FALCON | {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    "nemotron_h, 2 groups": ("nemotron_h", NEMOTRON),
}
LIMITS = CacheLimits(max_requests=4, max_tokens=128, max_sequence_length=1024)
GREEDY = SamplingParams(temperature=0, num_tokens_to_generate=20, termination_id=-1)
PROMPT = torch.randint(0, 1001, (300,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPTS = [PROMPT, PROMPT[:7], PROMPT[5:99]]


def compare_kernels() -> None:
    """Print how far torch's kernel in bfloat16 is from the softmax in float32 of the same values."""
    torch.manual_seed(0)
    page, queries = 256, torch.tensor([1, 100, 1, 256, 33])
    lengths = torch.tensor([1, 300, 700, 256, 33], dtype=torch.int32, device="cuda")
    starts = F.pad(queries.cumsum(0), (1, 0)).int().cuda()
    print("| heads, of keys, channels | kernel | largest difference from float32 |\n|---|---|---|")
    for heads, kv_heads, width in ((8, 2, 64), (4, 4, 40), (16, 1, 128)):
        table = torch.randperm(40, device="cuda")[:15].view(5, 3).int()
        k, v = (torch.randn(40, page, kv_heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(int(starts[-1]), heads, width, device="cuda", dtype=torch.bfloat16)
        half, full = (
            attention.paged_attention(*(t.to(dtype) for t in (q, k, v)), table, starts, lengths, (256, 700), 0.1)
            for dtype in (torch.bfloat16, torch.float32)
        )
        used, error = attention.implementation(q, page), (half.float() - full).abs().max().item()
        print(f"| {heads}, {kv_heads}, {width} | {used} | {error:.1e} |")


def build(folder: Path, family: str, sizes: dict) -> TinyModel:
    """A model of tests/models.py in these sizes, its matrices small enough for logits that bfloat16 can follow."""
    model = make_tiny(folder, family, tied=family.startswith("zamba"), **(HYBRID | sizes))
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name and "embed" not in name:
                parameter.mul_(0.3)
    model.hf.save_pretrained(folder)
    return model


def ours(folder: Path, dtype: str) -> tuple[torch.Tensor, list[list[int]]]:
    with LLM.from_pretrained(folder, dtype=dtype, limits=LIMITS) as llm:
        return llm.logits(PROMPT), [output.token_ids for output in llm.generate(PROMPTS, GREEDY)]


@torch.no_grad()
def row(name: str, model: TinyModel, folder: Path, found: dict) -> str:
    hf, ids = model.hf.cuda().eval(), torch.tensor([PROMPT]).cuda()
    exact = hf(ids).logits[0]
    theirs = type(hf).from_pretrained(folder, dtype=torch.bfloat16).cuda()(ids).logits[0].float()
    options = {"max_new_tokens": 20, "do_sample": False, "use_cache": False}
    tokens = []
    for prompt in PROMPTS:
        text = torch.tensor([prompt]).cuda()
        tokens.append(hf.generate(text, attention_mask=torch.ones_like(text), **options)[0, len(prompt) :].tolist())
    logits, answers = found["float32"]
    error = (logits - exact).abs().max() / exact.abs().max()
    half = [(t - exact).norm() / exact.norm() for t in (found["bfloat16"][0], theirs)]
    same = "all" if answers == tokens else "NOT"
    return f"| {name} | {error:.1e} | {same} equal | {half[0]:.4f} | {half[1]:.4f} |"


def main() -> None:
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 0))
    if not 0 < ranks <= torch.cuda.device_count():
        legal = f"torchrun --nproc-per-node 1 to {torch.cuda.device_count()}, a GPU each"
        raise UserError("number of ranks", ranks, "cannot be had", legal if torch.cuda.is_available() else "GPUs")
    torch.cuda.set_device(rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl")
    shared = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(shared)
    if rank == 0:
        print(f"{date.today()}, {ranks} x {torch.cuda.get_device_name()}, torch {torch.__version__}.\n")
        compare_kernels()
        print(f"\n| family, TP={ranks} | float32: logits' error | tokens | bfloat16: error | Hugging Face's |")
        print("|---|---|---|---|---|")
    for name, (family, sizes) in MODELS.items():
        folder = Path(shared[0]) / name
        model = build(folder, family, sizes) if rank == 0 else None
        dist.barrier()
        found = {dtype: ours(folder, dtype) for dtype in ("float32", "bfloat16")}
        if rank == 0:
            print(row(name, model, folder, found), flush=True)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guarded(main))
