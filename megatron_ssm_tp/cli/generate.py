"""`generate`: text as it comes, then its speed."""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .console import is_speaker, quieted, say
from .files import check_writable, write_whole

if TYPE_CHECKING:
    from ..comm.recipe_book import RecipeBook
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
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="for each prompt (128)")
    _add_sampling(parser)
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--tokenizer-model", metavar="FILE", help="a tokenizer.json, or a directory that has one")
    _add_limits(parser)
    parser.add_argument(
        "--engine", default="auto", help="who schedules: slots (models of SSM layers alone), megatron, or auto"
    )
    parser.add_argument(
        "--ops",
        default="auto",
        help="who computes convolutions and scans: triton, reference, or auto: see doctor",
    )
    _add_reductions(parser)
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="a JSON report: instead of text, or into FILE beside it"
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 is greedy; default: greedy, or 1 with --top-k, --top-p or --min-p",
    )
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0 is off")
    parser.add_argument("--top-p", type=float, default=0.0, help="sample among the likeliest that sum to p; 0 is off")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="leave out what is less likely than p of the likeliest"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of tokens that were there; 1 is off")
    parser.add_argument(
        "--seed", type=int, default=0, help="of sampling: the same seed, prompts and limits give the same text"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-sequence-length", type=int, default=32768, help="prompt and answer, in tokens")
    parser.add_argument("--max-requests", type=int, default=16, help="prompts that run at once; the others wait")
    parser.add_argument(
        "--max-cached-tokens", type=int, help="tokens of all prompts together with room for keys and values (hybrids)"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="tokens in one step; longer prompts go in chunks")
    parser.add_argument(
        "--prefix-bytes",
        type=int,
        default=0,
        metavar="N",
        help="of states kept after prefixes that prompts share (slots)",
    )


def _add_reductions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tp-allreduce-recipe",
        metavar="NAME",
        help="how partial sums travel between ranks: none (Megatron's all-reduce), bf16, int8, fp8, int4; x_proj's "
        "stay Megatron's. Default: none, but bf16, x_proj's too, in steps and graphs of the engine slots on GPUs",
    )
    parser.add_argument(
        "--tp-allreduce-min-bytes",
        type=int,
        metavar="N",
        help="with a recipe: smaller tensors are left to Megatron",
    )
    parser.add_argument(
        "--tp-allreduce-cfg",
        metavar="FILE",
        help="YAML that names a recipe for each site instead, by globs on module names: grammar in docs/recipes.md",
    )
    parser.add_argument(
        "--tp-overlap-from",
        type=int,
        metavar="N",
        help="steps over N tokens of prompts or more hide sums between ranks behind products (default: never)",
    )
    parser.add_argument(
        "--tp-overlap",
        default="halves",
        metavar="WAY",
        help="halves (of the tokens, by turns; models of SSM layers alone) or x_proj (behind z's product; Mamba-1)",
    )


def _read_inputs(args: argparse.Namespace) -> list[str]:
    """The prompts; also finds out what would fail only after the work."""
    prompts = list(args.prompt or [])
    if args.json != STDOUT:
        check_writable("json", args.json)
    if args.prompt_file is not None:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "prompt_file", args.prompt_file, f"cannot be read ({error})", "a UTF-8 text file"
            ) from error
        found = [line for line in lines if line.strip()]
        if not found:
            raise UserError("prompt_file", args.prompt_file, "has no prompt", "one prompt a line")
        prompts += found
    if not prompts:
        raise UserError("--prompt", None, "is missing", "--prompt TEXT or --prompt-file FILE")
    if args.temperature == 0 and _is_sampled(args):
        problem = "is greedy, which leaves --top-k, --top-p and --min-p nothing to choose from"
        raise UserError("temperature", args.temperature, problem, "a number above 0, or none of these")
    return prompts


def _is_sampled(args: argparse.Namespace) -> bool:
    return bool(args.top_k or args.top_p or args.min_p)


def _read_recipes(args: argparse.Namespace) -> "RecipeBook | None":
    """What --tp-allreduce-cfg or --tp-allreduce-recipe say. Raises UserError: both are given, or either is wrong."""
    from ..comm.recipe_book import RecipeBook
    from ..comm.recipes import recipe_by_name

    name, file, least = args.tp_allreduce_recipe, args.tp_allreduce_cfg, args.tp_allreduce_min_bytes
    if least is not None and name in (None, "none"):
        raise UserError("tp_allreduce_min_bytes", least, "is of no recipe", "beside --tp-allreduce-recipe")
    if file is not None and name is not None:
        raise UserError("tp_allreduce_recipe", name, "stands beside --tp-allreduce-cfg", "one of the two")
    if file is not None:
        return RecipeBook.from_yaml_file(file)
    if name is None:
        return None
    recipe = recipe_by_name(name)
    return RecipeBook.everywhere(recipe if least is None else replace(recipe, min_bytes=least))


def run(args: argparse.Namespace) -> None:
    from .. import LLM, CacheLimits, SamplingParams
    from ..inference.distributed import join
    from ..ranks import agree

    quieted()
    _, groups = join(args.tensor_model_parallel_size)
    prompts = agree(lambda: _read_inputs(args), groups.tp)
    temperature = args.temperature if args.temperature is not None else float(_is_sampled(args))
    params = SamplingParams(
        temperature=temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.max_new_tokens,
    )
    params.add_attributes({"min_p": args.min_p, "repetition_penalty": args.repetition_penalty})
    recipes = agree(lambda: _read_recipes(args), groups.tp)
    if recipes is not None and groups.tp.size() == 1:
        print("note: one rank: nothing is reduced, and recipes change nothing", file=sys.stderr, flush=True)
    limits = CacheLimits(
        max_requests=args.max_requests,
        max_tokens=args.max_tokens,
        max_sequence_length=args.max_sequence_length,
        max_cached_tokens=args.max_cached_tokens,
        prefix_bytes=args.prefix_bytes,
    )
    llm = LLM.from_pretrained(
        args.load,
        args.tensor_model_parallel_size,
        args.dtype,
        tokenizer=args.tokenizer_model,
        limits=limits,
        seed=args.seed,
        ops=args.ops,
        engine=args.engine,
        tp_allreduce=recipes,
        tp_overlap_from=args.tp_overlap_from,
        tp_overlap=args.tp_overlap,
    )
    started = time.monotonic()
    pieces = llm.stream(prompts, params)
    outputs = _collect(pieces) if args.json == STDOUT else _print_as_it_comes(prompts, pieces)
    seconds = time.monotonic() - started
    agree(lambda: _report(args, llm, outputs, seconds), groups.tp)
    llm.close()
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
        "engine": llm.engine.name,
        "ops": _ops_in_use(llm),
        "tp_allreduce": _recipes_in_force(args, llm),
        "outputs": [{k: v for k, v in asdict(output).items() if k != "state"} for output in outputs],
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": first,
    }
    if args.json == STDOUT:
        say(json.dumps(report))
    elif is_speaker():
        write_whole("json", args.json, json.dumps(report, indent=1))


def _ops_in_use(llm: "LLM") -> dict[str, str]:
    """Who computes convolutions and scans, and why."""
    from ..layers.mixer import SSMMixer

    ops = next(module.ops for module in llm.model.modules() if isinstance(module, SSMMixer))
    return {"name": ops.name, "reason": ops.reason}


def _recipes_in_force(args: argparse.Namespace, llm: "LLM") -> dict[str, object]:
    """As they were asked for, and how many sites each format reduces, in passes over prompts and in steps and graphs
    of our engine; none is Megatron's own all-reduce."""
    from ..comm.autocast import allreduce_autocast
    from ..inference.engine import SlotEngine
    from ..layers.row_parallel import RecipeRowParallelLinear, recipe_now

    linears = [m for m in llm.model.modules() if isinstance(m, RecipeRowParallelLinear) and not m.reduced_elsewhere]

    def sites() -> dict[str, int]:
        found = [recipe_now(linear) for linear in linears]
        return dict(Counter("none" if recipe is None else recipe.name for recipe in found))

    of_steps = sites()
    if isinstance(llm.engine, SlotEngine):
        book = llm.engine.sums.book()
        with allreduce_autocast(enabled=book is not None, recipe=book):
            of_steps = sites()
    return {
        "recipe": args.tp_allreduce_recipe,
        "cfg": args.tp_allreduce_cfg,
        "min_bytes": args.tp_allreduce_min_bytes,
        "sites": sites(),
        "sites_of_steps": of_steps,
    }


def _leave_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
