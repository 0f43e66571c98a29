"""What recipes of quantized all-reduces cost in quality: perplexity, KL and top-1 agreement on a held-out text.

    torchrun --nproc-per-node 2 tools/eval_quality.py --load DIR --text FILE --recipes none bf16 int8 fp8 int4

Each recipe (at all sites but x_proj's, or by site from a file) is compared with the plain model of the same dtype,
whose all-reduces are Megatron's, and with the plain model in float32.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_ssm_tp import quiet_imports

with quiet_imports():
    from measure import markdown
    from quality import (
        Books,
        Score,
        bytes_a_token,
        evaluate,
        open_setting,
        parser,
        sites_of,
    )
    from report_files import check_reports, write_json

    from megatron_ssm_tp.cli.console import guarded, is_speaker, say
    from megatron_ssm_tp.comm.recipe_book import RecipeBook
    from megatron_ssm_tp.comm.recipes import RECIPE_NAMES, recipe_by_name
    from megatron_ssm_tp.errors import renamed
    from megatron_ssm_tp.ranks import agree

PLAIN = "none"
HEADER = ["recipe", "perplexity", "change %", "KL, nats", "top-1 %"]
TO_EXACT = ["change to float32 %", "KL to float32", "top-1 with float32 %"]
BYTES = ["bytes a token", "of plain %"]


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, "--text")
    made.add_argument("--recipes", nargs="*", default=list(RECIPE_NAMES), metavar="NAME", help=", ".join(RECIPE_NAMES))
    made.add_argument(
        "--tp-allreduce-cfg", nargs="*", default=[], metavar="FILE", help="YAML of recipes by site (docs/recipes.md)"
    )
    made.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    return made.parse_args(argv)


def books_of(args: argparse.Namespace) -> Books:
    """The rows of the table, the plain model's first. Raises UserError: an unknown recipe, a file that is wrong."""
    check_reports(args.json)
    books: dict[str, RecipeBook | None] = {PLAIN: None}
    for name in args.recipes:
        with renamed(lambda field: "--block-size" if field == "block_size" else "--recipes"):
            recipe = recipe_by_name(name, **({} if name == PLAIN else {"block_size": args.block_size}))
        if recipe is not None:
            books[name if name == "bf16" else f"{name}, block {args.block_size}"] = RecipeBook.everywhere(recipe)
    return books | {Path(file).name: RecipeBook.from_yaml_file(file) for file in args.tp_allreduce_cfg}


def row(name: str, scores: tuple[Score, Score | None], wire: float, plain_wire: float) -> list[str]:
    to_plain, to_exact = scores
    cells = [name, f"{to_plain.perplexity:.4f}", f"{to_plain.change:+.4f}", f"{to_plain.kl:.2e}"]
    cells.append(f"{to_plain.agreement:.2f}")
    if to_exact is not None:
        cells += [f"{to_exact.change:+.4f}", f"{to_exact.kl:.2e}", f"{to_exact.agreement:.2f}"]
    return [*cells, f"{wire:.0f}", f"{100 * wire / plain_wire:.1f}"]


def run(args: argparse.Namespace) -> None:
    setting = open_setting(args)
    books = agree(lambda: books_of(args), setting.groups.tp)
    for book in filter(None, books.values()):
        book.check_backends(setting.groups.tp, setting.device)
    model = setting.model(args.dtype)
    exact = setting.model("float32") if args.dtype != "float32" else None
    sites = sites_of(model, setting.text.windows[:1, :-1])
    found = evaluate(model, books, setting.text, exact)
    itemsize, tokens = getattr(torch, args.dtype).itemsize, setting.text.tokens_a_batch
    wire = {name: bytes_a_token(sites, book, tokens, itemsize) for name, book in books.items()}
    rows = [row(name, scores, wire[name], wire[PLAIN]) for name, scores in found.items()]
    say(f"{setting.conditions}\n")
    say(markdown(HEADER + (TO_EXACT if exact is not None else []) + BYTES, rows))
    if args.json and is_speaker():
        write_json(args.json, report(setting.conditions, found, wire), indent=2)
    dist.destroy_process_group()


def report(conditions: str, found: dict[str, tuple[Score, Score | None]], wire: dict[str, float]) -> dict:
    recipes = {
        name: {
            "to_plain": to_plain.as_dict(),
            "to_float32": to_exact.as_dict() if to_exact is not None else None,
            "bytes_a_token": wire[name],
        }
        for name, (to_plain, to_exact) in found.items()
    }
    return {"conditions": conditions, "recipes": recipes}


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
