"""What bench_inference.py requests measures: whole requests on our engine, prompts and the tokens that answer them.

A batch of requests comes at once and is answered to its end, greedy; times are medians of five, of the slowest rank.
"""

import argparse
from itertools import product
from statistics import median
from time import perf_counter

import torch
from bench_models import Ours, draw_tokens, free_memory, reader, recipes_of
from bench_options import Asked, Setting, add_common, check_counts, check_pure_ssm
from measure import largest, markdown, tried
from megatron.core.inference.sampling_params import SamplingParams
from options import read_shape
from report_files import write_json

from megatron_ssm_tp.cli.console import is_speaker, say
from megatron_ssm_tp.inference.requests import Request
from megatron_ssm_tp.layers.row_parallel import set_recipes

REPEATS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=["1x2048", "8x2048"], metavar="PROMPTSxTOKENS")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of each answer (128)")
    parser.add_argument("--max-tokens", type=int, default=8192, help="of prompts in a pass (8192)")
    add_common(parser)


def check(args: argparse.Namespace, asked: Asked) -> None:
    """Raises UserError: anything that would fail only later."""
    check_pure_ssm(asked)
    for text in args.shapes:
        read_shape(text)
    check_counts("--new-tokens", [args.new_tokens], "tokens")
    check_counts("--max-tokens", [args.max_tokens], "tokens")


def run(setting: Setting) -> None:
    """Measure and report, what there is of it, if it is interrupted too."""
    args, device, cells = setting.args, setting.device, []
    try:
        for name in setting.asked.models:
            ours = setting.model(name)
            for recipe, shape in product(args.recipes, map(read_shape, args.shapes)):
                set_recipes(ours.model, recipes_of(recipe))
                seconds, note = tried(lambda shape=shape, ours=ours: _seconds(ours, *shape, args, device), device)
                free_memory()
                own = {"model": name, "recipe": recipe, "batch": shape[0], "length": shape[1]}
                cells.append(own | {"seconds": seconds, "note": note})
    finally:
        if cells and is_speaker():
            rows = [_row(cell) for cell in cells]
            say(f"\n{markdown(['model', 'sums', 'prompts x tokens', 's a batch', 'requests/s'], rows)}\n")
            write_json(args.json, {"conditions": setting.conditions, "options": vars(args), "cells": cells})


def _row(cell: dict) -> list[str]:
    seconds = cell["seconds"]
    shown = [cell["note"], "-"] if seconds is None else [f"{seconds:.3f}", f"{cell['batch'] / seconds:.2f}"]
    return [cell["model"], cell["recipe"], f"{cell['batch']}x{cell['length']}", *shown]


def _seconds(ours: Ours, batch: int, length: int, args: argparse.Namespace, device: torch.device) -> float:
    """The median time to answer the batch, but for the first time."""
    engine = ours.engine(batch, args.max_tokens)
    params = SamplingParams(temperature=0.0, num_tokens_to_generate=args.new_tokens, termination_id=-1)
    reads = reader(engine.table, ours.config.vocab_size, length + args.new_tokens)
    prompts, times = draw_tokens(batch, length, ours.config.vocab_size).tolist(), []
    for _ in range(1 + REPEATS):
        requests: list[Request] = reads.read(prompts, params)
        begin = perf_counter()
        answers = engine.generate(requests)
        times.append(largest(perf_counter() - begin, device))
        assert all(len(answer.token_ids) == args.new_tokens for answer in answers.values()), "an answer is too short"
    return median(times[1:])
