"""The demo's job on one GPU and on two (NCCL), in float32 and bfloat16: are the greedy tokens the same?

    python tools/check_two_gpus.py            # prints a Markdown report; docs/two-gpus.md is one

Where bfloat16 leaves float32's path, the report says after how many tokens, and how far apart float32's two likeliest
tokens were there. Last, one of two ranks is killed in the middle of a generation, without a launcher to notice.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

CHECKPOINTS = Path(__file__).parent.parent / "examples" / "checkpoints"
NAMES = ("mamba-kjv-2.7m", "falcon-mamba-kjv-2.7m", "zamba2-kjv-2.9m")
PROMPTS = (
    "And God said unto Moses,",
    "Then Jesus answered and said",
    "The words of the wise",
    "In the beginning",
    "And it came to pass",
    "David",
    "The children of Israel",
    "Blessed are",
)
TOKENS = 100


def arguments(name: str, dtype: str, report: Path) -> list[str]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    fixed = ["generate", "--load", str(CHECKPOINTS / name), "--max-new-tokens", str(TOKENS)]
    return [*fixed, *prompts, "--dtype", dtype, "--json", str(report)]


def generate(name: str, gpus: int, dtype: str, folder: Path) -> dict:
    """The report of one run of the command, in a plain process or under torchrun."""
    report = folder / f"{name}-{gpus}-{dtype}.json"
    module = ["-m", "megatron_ssm_tp", *arguments(name, dtype, report)]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    command = [sys.executable, *(torchrun if gpus > 1 else []), *module]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return json.loads(report.read_text())


def equal_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def margin(llm, output: dict, at: int) -> float:
    """How much likelier (in nats) float32's choice of token `at` was than the next."""
    logits = llm.logits(output["prompt_token_ids"] + output["token_ids"][:at])[-1]
    first, second = logits.log_softmax(-1).topk(2).values.tolist()
    return first - second


def hugging_face(name: str, dtype: str) -> list[list[int]]:
    """Greedy tokens of transformers' own implementation, on one GPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=getattr(torch, dtype)).to("cuda")
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to("cuda")
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def compare(name: str, folder: Path) -> bool:
    """Print one checkpoint's table; whether two GPUs gave float32's tokens in float32."""
    from megatron_ssm_tp import LLM

    runs = {key: generate(name, *key, folder) for key in itertools.product((1, 2), ("float32", "bfloat16"))}
    reference = runs[1, "float32"]["outputs"]
    llm = LLM.from_pretrained(CHECKPOINTS / name, dtype="float32")
    found = {
        f"{gpus} GPU, {dtype}": ([output["token_ids"] for output in run["outputs"]], f"{run['tokens_per_second']:.0f}")
        for (gpus, dtype), run in runs.items()
    }
    found |= {f"Hugging Face, {dtype}": (hugging_face(name, dtype), "-") for dtype in ("float32", "bfloat16")}
    print(f"\n## {name}\n")
    print("| run | tokens/s | prompts equal to one GPU in float32 | first difference: token, margin in nats |")
    print("|---|---|---|---|")
    for run, (answers, speed) in found.items():
        differences = []
        for expected, answer in zip(reference, answers, strict=True):
            if expected["token_ids"] != answer:
                at = equal_prefix(expected["token_ids"], answer)
                differences.append(f"{at}: {margin(llm, expected, at):.4f}")
        equal = len(answers) - len(differences)
        print(f"| {run} | {speed} | {equal} of {len(answers)} | {', '.join(differences) or '-'} |", flush=True)
    return found["2 GPU, float32"][0] == found["1 GPU, float32"][0]


def kill_one_rank(folder: Path) -> None:
    """Two ranks with torchrun's environment but without torchrun; rank 1 is killed while generating."""
    port = str(29000 + os.getpid() % 1000)
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "megatron_ssm_tp", "generate", "--load", str(CHECKPOINTS / NAMES[0])]
    command += ["--prompt", PROMPTS[0], "--max-new-tokens", "30000"]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ranks[0].stdout.read(30)
    ranks[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    try:
        _, stderr = ranks[0].communicate(timeout=60)
        lines = [line for line in stderr.splitlines() if line.startswith("error")]
        print(f"rank 0 ended after {time.monotonic() - killed:.1f} s with status {ranks[0].returncode}: `{lines}`")
    except subprocess.TimeoutExpired:
        ranks[0].kill()
        print("rank 0 was still waiting after 60 s")


def main() -> None:
    if torch.cuda.device_count() < 2:
        sys.exit("two GPUs are needed")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    print("# Two GPUs\n")
    print(f"{date.today()}, 2 x {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {nccl}.")
    print(f"`python tools/check_two_gpus.py`: greedy, {len(PROMPTS)} prompts of {TOKENS} tokens.")
    with tempfile.TemporaryDirectory() as folder:
        equal = [compare(name, Path(folder)) for name in NAMES]
        print("\n## A rank killed while generating, no launcher\n")
        kill_one_rank(Path(folder))
    if not all(equal):
        sys.exit("float32 tokens differ")


if __name__ == "__main__":
    main()
