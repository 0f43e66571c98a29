"""Three trained checkpoints write text on two tensor-parallel ranks of this machine, and on one for comparison.

`make demo` runs it. On a machine with two GPUs the ranks use them, over NCCL; otherwise the CPU, over gloo.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

CHECKPOINTS = Path(__file__).parent / "checkpoints"
PROMPTS = ["And God said unto Moses,", "Then Jesus answered and said", "The words of the wise"]
NAMES = ["mamba-kjv-2.7m", "falcon-mamba-kjv-2.7m", "zamba2-kjv-2.9m"]
TORCHRUN = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "megatron_ssm_tp"]  # on a free port
# Two ranks want two GPUs, or none.
ENVIRONMENT = os.environ | ({} if torch.cuda.device_count() >= 2 else {"CUDA_VISIBLE_DEVICES": ""})
ONE_PROCESS = [sys.executable, "-m", "megatron_ssm_tp"]


def arguments(name: str, tp: int, report: Path) -> list[str]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    load = ["--load", str((CHECKPOINTS / name).relative_to(Path.cwd(), walk_up=True))]
    size = ["--tensor-model-parallel-size", str(tp)]
    return ["generate", *load, *size, *prompts, "--max-new-tokens", "80", "--dtype", "float32", "--json", str(report)]


def shown(command: list[str]) -> str:
    return " ".join(f'"{word}"' if " " in word else word for word in command)


def token_ids(report: Path) -> list[list[int]]:
    return [output["token_ids"] for output in json.loads(report.read_text())["outputs"]]


def run(name: str, folder: Path) -> None:
    """Generate on two ranks in the foreground and on one meanwhile; exit with status 1 if the tokens differ."""
    two, one = folder / f"{name}-2.json", folder / f"{name}-1.json"
    command = [*TORCHRUN, *arguments(name, 2, two)]
    print(f"\n$ {shown(command)}\n", flush=True)
    with subprocess.Popen(
        [*ONE_PROCESS, *arguments(name, 1, one)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as single:
        two_ranks = subprocess.run(command, check=False, env=ENVIRONMENT)
        _, errors = single.communicate()
    if two_ranks.returncode:
        sys.exit(f"{name}: two ranks failed")
    if single.returncode:
        sys.exit(f"one process failed:\n{errors}")
    pairs = list(zip(token_ids(two), token_ids(one), strict=True))
    if any(a != b for a, b in pairs):
        sys.exit(f"{name}: tokens on two ranks differ from those on one")
    count = sum(len(a) for a, _ in pairs)
    print(f"compared: {count} tokens of {len(pairs)} prompts on two ranks equal those of one process (TP=1)")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            run(name, Path(folder))


if __name__ == "__main__":
    main()
