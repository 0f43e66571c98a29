"""How fast whole models run: this package's, and mamba-ssm's of the same shape where it is installed, in one run.

    python tools/bench_inference.py prefill                                                   # one GPU
    torchrun --standalone --nproc-per-node 2 tools/bench_inference.py prefill --recipes none int8

Weights are random, made on the device. With --layers the first layers of a model are run, and the time of a whole one
is told from theirs; what each subcommand measures stands in its module (*_bench.py).
"""

import argparse
import gc
import os
import sys
from time import perf_counter

import torch.distributed as dist
from measure import NO_MULTICAST, conditions, in_words, meet

from megatron_ssm_tp import quiet_imports
from megatron_ssm_tp.cli.console import RUN_ERROR, Parser, guarded, is_speaker, quieted, say
from megatron_ssm_tp.ranks import agree, check_all_same, lost_peers_reported

with quiet_imports():
    import decode_bench
    import prefill_bench
    import prefix_bench
    import request_bench
    import scaling_bench
    import serve_bench
    from bench_options import Asked, Setting, read_common

    from megatron_ssm_tp.inference.distributed import join

COMMANDS = {
    "prefill": (prefill_bench, "prompts, a pass each"),
    "decode": (decode_bench, "steps of decoding, a token a request each"),
    "serve": (serve_bench, "a load of requests that come one by one, or a soak of all kinds"),
    "prefix": (prefix_bench, "the first token with and without a kept prefix"),
    "requests": (request_bench, "whole requests, prompts and their answers"),
    "scaling": (scaling_bench, "all of it on 1, 2 and 4 ranks, which it starts itself"),
}


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = made.add_subparsers(dest="command", required=True)
    for name, (module, words) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=words, description=module.__doc__))
    return made.parse_args(argv)


def check(args: argparse.Namespace, ranks: int) -> Asked:
    """Raises UserError: anything that would fail only later."""
    asked = read_common(args, ranks)
    COMMANDS[args.command][0].check(args, asked)
    return asked


def run(args: argparse.Namespace) -> None:
    quieted()
    if args.command == "scaling":
        return scaling_bench.run(args)
    os.environ.update(NO_MULTICAST)
    began = perf_counter()
    device, groups = join(None)
    gc.freeze()  # what was imported is not collected through
    asked = agree(lambda: check(args, groups.tp.size()), dist.group.WORLD)
    check_all_same({f"--{name}": str(value) for name, value in vars(args).items()}, dist.group.WORLD)
    found = conditions(device)
    say(in_words(found) + "\n")
    with lost_peers_reported():
        failure = COMMANDS[args.command][0].run(Setting(args, asked, groups, device, found))
    say(f"{perf_counter() - began:.0f} s in all.")
    if failure and is_speaker():
        print(f"error: {failure}", file=sys.stderr, flush=True)
    meet()
    dist.destroy_process_group()
    if failure:
        sys.exit(RUN_ERROR)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
