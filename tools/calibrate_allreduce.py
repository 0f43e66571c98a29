"""Choose the recipe of each reduction by measured sensitivity: the fewest bytes within a budget of damage.

    torchrun --nproc-per-node 2 tools/calibrate_allreduce.py --load DIR --data TEXT --budget 1e-3 --out recipes.yaml

Runs the text with one site quantized at a time, by each of the recipes, and lists what each costs. Those that cost the
least KL for a byte saved come first; the file takes as many of them, in this order, as keep KL(plain || chosen),
measured with all of them together, within the budget (nats a token). x_proj feeds an exponential: it is measured like
the others, and put in the file only with --x-proj.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import yaml

from megatron_ssm_tp import quiet_imports

with quiet_imports():
    from measure import markdown
    from quality import (
        Score,
        Setting,
        Site,
        bytes_a_token,
        evaluate,
        open_setting,
        parser,
        sites_of,
    )
    from report_files import check_reports, write_json, write_plot

    from megatron_ssm_tp import UserError
    from megatron_ssm_tp.cli.console import guarded, is_speaker, say
    from megatron_ssm_tp.cli.files import check_writable, write_whole
    from megatron_ssm_tp.comm.recipe_book import X_PROJ, RecipeBook
    from megatron_ssm_tp.comm.recipes import RECIPE_NAMES, AllReduceRecipe, recipe_by_name
    from megatron_ssm_tp.errors import renamed
    from megatron_ssm_tp.layers.model import SSMModel
    from megatron_ssm_tp.ranks import agree

Choice = dict[str, AllReduceRecipe]  # recipes by site; sites that are not there stay plain


class Move(NamedTuple):
    """One site quantized by one recipe, and what that alone did."""

    site: str
    recipe: AllReduceRecipe
    saved: float  # bytes a token
    damage: Score

    @property
    def cost(self) -> float:
        """KL for a byte saved."""
        return self.damage.kl / self.saved if self.saved > 0 else math.inf


def chosen_by(moves: list[Move]) -> Choice:
    """Moves in their order: a later one of the same site counts where it saves more."""
    saved: dict[str, float] = {}
    choice: Choice = {}
    for move in moves:
        if move.saved > saved.get(move.site, 0):
            saved[move.site], choice[move.site] = move.saved, move.recipe
    return choice


def choose(moves: list[Move], budget: float, measure: Callable[[Choice], Score]) -> tuple[Choice, Score | None]:
    """The longest run of the cheapest moves whose measured KL, all together, is within the budget.

    Bisection: KL is taken to grow with the number of moves. What is returned has been measured; None: nothing fits.
    """
    ranked = sorted((move for move in moves if move.saved > 0), key=lambda move: move.cost)
    fits, damage, beyond = 0, None, len(ranked) + 1
    tried = len(ranked)
    while fits + 1 < beyond:
        found = measure(chosen_by(ranked[:tried]))
        if found.kl <= budget:
            fits, damage = tried, found
        else:
            beyond = tried
        tried = (fits + beyond) // 2
    return chosen_by(ranked[:fits]), damage


def config_of(choice: Choice) -> dict:
    """What RecipeBook.from_config_dict takes, and a recipe file holds."""
    configs = {_config_name(recipe): recipe.as_config() for recipe in choice.values()}
    matchers = {
        site: {"type": "glob", "pattern": site, "config": _config_name(recipe), "enabled": True}
        for site, recipe in choice.items()
    }
    return {"configs": configs, "matchers": matchers}


def _config_name(recipe: AllReduceRecipe) -> str:
    return f"{recipe.name}_{recipe.block_size}"


def book_of(choice: Choice) -> RecipeBook:
    return RecipeBook.from_config_dict(config_of(choice))


def recipe_text(choice: Choice, notes: list[str]) -> str:
    """A file for --tp-allreduce-cfg, its `notes` in comments at the top."""
    comments = "".join(f"# {note}\n" for note in notes)
    return comments + yaml.safe_dump(config_of(choice), sort_keys=False)


def measure_moves(model: SSMModel, setting: Setting, sites: list[Site], recipes: list[AllReduceRecipe]) -> list[Move]:
    """Each site by each recipe, alone."""
    pairs = {f"{site.name} {recipe.name}": (site, recipe) for site in sites for recipe in recipes}
    books = {name: book_of({site.name: recipe}) for name, (site, recipe) in pairs.items()}
    found = evaluate(model, books, setting.text)
    itemsize, tokens = next(model.parameters()).element_size(), setting.text.tokens_a_batch
    moves = []
    for name, (site, recipe) in pairs.items():
        saved = [bytes_a_token([site], book, tokens, itemsize) for book in (None, books[name])]
        moves.append(Move(site.name, recipe, saved[0] - saved[1], found[name][0]))
    return moves


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__, "--data")
    made.add_argument("--budget", type=float, required=True, metavar="KL", help="nats a token, such as 0.001")
    made.add_argument("--recipe", nargs="+", default=["int8"], metavar="NAME", help="one or more formats to choose of")
    made.add_argument("--x-proj", action="store_true", help="let x_proj be chosen like the others")
    made.add_argument("--out", metavar="FILE", help="the recipe file to write")
    made.add_argument("--plot", metavar="FILE", help="damage by layer and kind of site, as a picture")
    made.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    return made.parse_args(argv)


def recipes_of(args: argparse.Namespace) -> list[AllReduceRecipe]:
    """Raises UserError: anything that would fail only after the work."""
    check_writable("--out", args.out)
    check_reports(args.json, args.plot)
    if not args.budget > 0 or math.isinf(args.budget):
        raise UserError("--budget", args.budget, "no budget", "a number above 0, in nats a token")
    for name in args.recipe:
        if name == "none" or name not in RECIPE_NAMES:
            problem = "quantizes nothing" if name == "none" else "unknown format"
            raise UserError("--recipe", name, problem, ", ".join(RECIPE_NAMES[1:]))
    with renamed("--block-size"):
        return [recipe_by_name(name, block_size=args.block_size) for name in dict.fromkeys(args.recipe)]


def run(args: argparse.Namespace) -> None:
    setting = open_setting(args)
    recipes = agree(lambda: recipes_of(args), setting.groups.tp)
    model = setting.model(args.dtype)
    sites = sites_of(model, setting.text.windows[:1, :-1])
    moves = measure_moves(model, setting, sites, recipes)
    free = [move for move in moves if args.x_proj or X_PROJ not in move.site.split(".")]

    def measure(choice: Choice) -> Score:
        return evaluate(model, {"chosen": book_of(choice)}, setting.text)["chosen"][0]

    choice, damage = choose(free, args.budget, measure)
    itemsize, tokens = getattr(torch, args.dtype).itemsize, setting.text.tokens_a_batch
    wire = [bytes_a_token(sites, book, tokens, itemsize) for book in (None, book_of(choice))]
    notes = [setting.conditions, *summary(args.budget, choice, damage, wire, len(sites))]
    if is_speaker():
        say(f"{setting.conditions}\n\n{table(moves, choice)}\n\n" + "\n".join(notes[1:]))
        if args.out:
            write_whole("--out", args.out, recipe_text(choice, notes))
        if args.plot:
            plot(moves, args.plot, setting.conditions.split(";")[0])
        if args.json:
            write_json(args.json, report(notes, moves, choice, damage, wire), indent=2)
    dist.destroy_process_group()


def summary(budget: float, choice: Choice, damage: Score | None, wire: list[float], sites: int) -> list[str]:
    """What was chosen, in words."""
    if damage is None:
        return [f"Nothing is within the budget of {budget:g} nats: all {sites} sites stay plain."]
    cost = f"KL {damage.kl:.2e} of {budget:g} nats, top-1 {damage.agreement:.2f} %, perplexity {damage.change:+.4f} %"
    share = f"{wire[1]:.0f} bytes a token, {100 * wire[1] / wire[0]:.1f} % of plain"
    return [f"{len(choice)} of {sites} sites quantized: {cost}; {share}."]


def table(moves: list[Move], choice: Choice) -> str:
    """All moves, the most damaging first."""
    header = ["site", "recipe", "KL, nats", "top-1 %", "perplexity %", "bytes saved a token", "chosen"]
    rows = []
    for move in sorted(moves, key=lambda move: -move.damage.kl):
        name, damage = _config_name(move.recipe), move.damage
        figures = [f"{damage.kl:.2e}", f"{damage.agreement:.2f}", f"{damage.change:+.4f}", f"{move.saved:.1f}"]
        rows.append([move.site, name, *figures, "yes" if choice.get(move.site) == move.recipe else "no"])
    return markdown(header, rows)


def report(notes: list[str], moves: list[Move], choice: Choice, damage: Score | None, wire: list[float]) -> dict:
    measured = [
        {"site": move.site, "recipe": move.recipe.as_config(), "bytes_saved": move.saved} | move.damage.as_dict()
        for move in moves
    ]
    combined = {"bytes_a_token": wire[1], "plain_bytes_a_token": wire[0]} | (damage.as_dict() if damage else {})
    return {"notes": notes, "sites": measured, "chosen": config_of(choice), "combined": combined}


def place(site: str) -> tuple[str, int]:
    """(kind, layer) of a site: decoder.layers.3.mixer.out_proj -> ("mixer.out_proj", 3)."""
    numbers = re.findall(r"\.(\d+)\.", site)
    kind = re.sub(r"^.*\.\d+\.", "", site)
    shared = "shared " if "shared" in site else ""
    return shared + kind, int(numbers[-1]) if numbers else 0


def plot(moves: list[Move], path: str, title: str) -> None:
    """KL over the layer, one line for each kind of site and recipe."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for move in moves:
        kind, layer = place(move.site)
        lines.setdefault(f"{kind}, {_config_name(move.recipe)}", []).append((layer, move.damage.kl))
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="layer (of shared blocks: which)", ylabel="KL(plain || one site quantized), nats", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=8)
    write_plot(figure, path)


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(read_args())))
