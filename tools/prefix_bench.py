"""What bench_inference.py prefix measures: how long the first token takes with and without a kept prefix.

Each prompt is a prefix and a few tokens of its own; the time is from handing it to the engine to its first token on the
host. Without: prefixes that the engine has not seen. With: one whose states are kept. Greedy answers are compared: in
float32 they must be equal, in narrower dtypes passes of other shapes round otherwise. Where they are not, or a kept
prefix is not found, the status is 1.
"""

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from bench_models import AUTO, Ours, draw_tokens, reader
from bench_options import Asked, Setting, add_common, check_counts, check_pure_ssm
from measure import largest, markdown
from megatron.core.inference.sampling_params import SamplingParams
from report_files import write_json

from megatron_ssm_tp.cli.console import is_speaker, say
from megatron_ssm_tp.errors import UserError
from megatron_ssm_tp.inference.prefix_cache import PrefixCache
from megatron_ssm_tp.inference.requests import Request

REPEATS, ANSWER, SLOTS = 5, 8, 4


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefixes", nargs="+", type=int, default=[2048, 8192, 32768], metavar="TOKENS")
    parser.add_argument("--suffix", type=int, default=16, metavar="TOKENS", help="behind the prefix (16)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of prompts in a pass (8192)")
    add_common(parser)


def check(args: argparse.Namespace, asked: Asked) -> None:
    """Raises UserError: anything that would fail only later."""
    check_pure_ssm(asked)
    check_counts("--prefixes", args.prefixes, "tokens")
    check_counts("--suffix", [args.suffix], "tokens")
    check_counts("--max-tokens", [args.max_tokens], "tokens")
    if args.recipes != [AUTO]:
        raise UserError("--recipes", args.recipes, "are not compared here", AUTO)


def run(setting: Setting) -> str | None:
    """Measure and report; what does not hold."""
    args, rows = setting.args, []
    try:
        for name in setting.asked.models:
            ours = setting.model(name)
            for length in args.prefixes:
                rows.append({"model": name, **_measure(ours, length, args, setting.device)})
    finally:
        if rows and is_speaker():
            say(f"\n{_table(rows)}\n")
            write_json(args.json, {"conditions": setting.conditions, "options": vars(args), "rows": rows})
    return _failure(rows, setting.asked.dtype)


def _table(rows: list[dict]) -> str:
    header = ["model", "prefix", "first token without, ms", "with, ms", "times as soon", "found kept", "answers equal"]
    lines = []
    for row in rows:
        times = [f"{row['cold_ms']:.1f}", f"{row['warm_ms']:.2f}", f"{row['ratio']:.1f}"]
        counts = [f"{row['hits']} of {REPEATS + 1}", f"{row['equal']} of {REPEATS}"]
        lines.append([row["model"], str(row["prefix"]), *times, *counts, f"{row['bytes'] / 1e6:.1f}"])
    return markdown([*header, "MB kept a rank"], lines)


def _failure(rows: list[dict], dtype: torch.dtype) -> str | None:
    def where(failed: Callable[[dict], bool]) -> str:
        return "; ".join(f"{row['model']}, {row['prefix']}" for row in rows if failed(row))

    if lost := where(lambda row: row["hits"] <= REPEATS):
        return f"prefixes were not found: {lost}"
    differing = where(lambda row: row["equal"] < REPEATS)
    return f"answers after kept prefixes differ: {differing}" if differing and dtype == torch.float32 else None


def _measure(ours: Ours, length: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Seconds are of the slowest rank; every rank has the same answers."""
    config, tokens = ours.config, length + args.suffix
    engine = ours.engine(SLOTS, args.max_tokens)
    reads = reader(engine.table, config.vocab_size, tokens + ANSWER)
    drawn = draw_tokens(2 * REPEATS + 2, tokens, config.vocab_size).tolist()
    unseen, prefix = drawn[: REPEATS + 1], drawn[-1][:length]
    prompts = [prefix + other[length:] for other in drawn[: REPEATS + 1]]

    def asked(prompt: list[int], keep: bool = False) -> Request:
        params = SamplingParams(temperature=0.0, num_tokens_to_generate=ANSWER, termination_id=-1)
        [request] = reads.read([prompt], params)
        return Request(request.prompt, request.params, request.stop, keep_state=keep)

    def answered(requests: list[Request]) -> tuple[float, list[list[int]]]:
        """The median time to a first token, but for the first request's, which makes graphs; and all answers."""
        times, answers = [], []
        for request in requests:
            began, first, answer = perf_counter(), None, []
            for progress in engine.run([request]):
                first, answer = first or perf_counter() - began, progress.token_ids
            times.append(largest(first, device))
            answers.append(answer)
        return median(times[1:]), answers

    cold, _ = answered([asked(prompt) for prompt in unseen])
    _, expected = answered([asked(prompt) for prompt in prompts])
    engine.prefixes = PrefixCache(1 << 40)
    answered([asked(prefix, keep=True)] * 2)
    warm, found = answered([asked(prompt) for prompt in prompts])
    equal = sum(one == other for one, other in zip(found[1:], expected[1:], strict=True))
    found_kept, kept = engine.prefixes.counts.hits, engine.table.snapshot(0).nbytes
    times = {"cold_ms": cold * 1e3, "warm_ms": warm * 1e3, "ratio": cold / warm}
    return {"prefix": length, **times, "hits": found_kept, "equal": equal, "bytes": kept}
