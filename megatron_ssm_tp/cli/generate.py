"""`generate`: text as it comes, then its speed."""

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .console import is_speaker, say

if TYPE_CHECKING:
    from ..inference.llm import LLM, TextPiece
    from ..inference.requests import GenerationOutput


STDOUT = "-"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("generate", help="continue prompts; under torchrun on all its ranks")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="checkpoint directory, Hugging Face or state-spaces"
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, metavar="N", help="default: the number of processes")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times")
    parser.add_argument("--prompt-file", metavar="FILE", help="one prompt a line; blank lines are passed over")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, help="0 is greedy; default: greedy, or 1 with --top-k or --top-p")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0 is off")
    parser.add_argument("--top-p", type=float, default=0.0, help="sample among the likeliest that sum to p; 0 is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="a tokenizer.json, or a directory that has one")
    parser.add_argument("--max-sequence-length", type=int, default=32768, help="prompt and answer, in tokens")
    parser.add_argument("--max-requests", type=int, default=16, help="prompts that run at once; the others wait")
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens in one step; longer prompts go in chunks")
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="a JSON report: instead of text, or into FILE beside it"
    )


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt or [])
    if args.prompt_file is not None:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "prompt_file", args.prompt_file, f"cannot be read ({error})", "a UTF-8 text file"
            ) from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UserError("prompt", args.prompt_file, "is nowhere given", "--prompt TEXT, or --prompt-file with a line")
    return prompts


def _quiet_imports() -> None:
    """Megatron's imports tell of Apex and Transformer Engine, torch's of a missing CUDA; none of it is needed."""
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def run(args: argparse.Namespace) -> None:
    prompts = _read_prompts(args)
    _quiet_imports()
    from .. import LLM, CacheLimits, SamplingParams

    sampled = bool(args.top_k or args.top_p)
    temperature = args.temperature if args.temperature is not None else float(sampled)
    params = SamplingParams(
        temperature=temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.max_new_tokens,
    )
    limits = CacheLimits(
        max_requests=args.max_requests, max_tokens=args.max_tokens, max_sequence_length=args.max_sequence_length
    )
    llm = LLM.from_pretrained(
        args.load,
        args.tensor_model_parallel_size,
        args.dtype,
        tokenizer=args.tokenizer_model,
        limits=limits,
        seed=args.seed,
    )
    started = time.monotonic()
    pieces = llm.stream(prompts, params)
    outputs = _collect(pieces) if args.json == STDOUT else _print_as_it_comes(prompts, pieces)
    _report(args, llm, outputs, time.monotonic() - started)
    _leave_group()


def _collect(pieces: Iterable["TextPiece"]) -> list["GenerationOutput"]:
    finished = {piece.index: piece.output for piece in pieces if piece.output}
    return [finished[index] for index in sorted(finished)]


def _print_as_it_comes(prompts: list[str], pieces: Iterable["TextPiece"]) -> list["GenerationOutput"]:
    """Print answers in the prompts' order: the first unfinished one live, the others when it is their turn."""
    waiting = dict.fromkeys(range(len(prompts)), "")
    outputs: dict[int, GenerationOutput] = {}
    current = 0
    say(prompts[0], end="")
    for piece in pieces:
        waiting[piece.index] += piece.text
        if piece.output:
            outputs[piece.index] = piece.output
        while current < len(prompts):
            say(waiting[current], end="")
            waiting[current] = ""
            if current not in outputs:
                break
            current += 1
            say("\n")
            if current < len(prompts):
                say(prompts[current], end="")
    return [outputs[index] for index in range(len(prompts))]


def _report(args: argparse.Namespace, llm: "LLM", outputs: list["GenerationOutput"], seconds: float) -> None:
    tokens = sum(len(output.token_ids) for output in outputs)
    first = statistics.median(output.ttft for output in outputs)
    tp = llm.model.pg_collection.tp.size()
    if args.json != STDOUT:
        ranks = f"{tp} rank{'s' if tp > 1 else ''}"
        latency = f"time to first token {first * 1e3:.0f} ms (median of {len(outputs)})"
        say(f"{tokens} tokens in {seconds:.2f} s on {ranks}: {tokens / seconds:.1f} tokens/s; {latency}")
    if args.json is None:
        return
    report = {
        "load": args.load,
        "tensor_model_parallel_size": tp,
        "dtype": str(llm.model.config.params_dtype).removeprefix("torch."),
        "outputs": [asdict(output) for output in outputs],
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": first,
    }
    if args.json == STDOUT:
        say(json.dumps(report))
    elif is_speaker():
        _write_whole(Path(args.json), json.dumps(report, indent=1))


def _write_whole(path: Path, text: str) -> None:
    """All of the file or none of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError("json", str(path), f"cannot be written ({error})", "a file in a folder that exists") from error


def _leave_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
