"""What bench_inference.py has measured: cells, ratios, Markdown, JSON, picture."""

import argparse
from typing import NamedTuple

from layer_parts import PARTS
from measure import in_words, markdown
from report_files import write_json, write_plot

from megatron_ssm_tp.cli.console import say

OURS, RIVAL = "megatron_ssm_tp", "mamba-ssm"


class Cell(NamedTuple):
    """What was measured of one way at one shape; `note` says why it was not. Times are of the whole model."""

    model: str
    way: str
    batch: int
    length: int
    ms: float | None = None
    layer_ms: float | None = None
    host_ms: float | None = None  # until the host has launched all that ran; not scaled to the whole model
    peak_gb: float | None = None  # of the layers that ran
    parts: dict[str, float] | None = None  # ms a layer; OUTSIDE: ms a pass
    note: str = ""
    ratio: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        return self.batch * self.length / self.ms * 1e3 if self.ms else None


def with_ratios(cells: list[Cell]) -> list[Cell]:
    """Speed as a multiple of mamba-ssm's, or else of the first way's."""
    found = []
    for cell in cells:
        alike = [c for c in cells if (c.model, c.batch, c.length) == (cell.model, cell.batch, cell.length) and c.ms]
        base = next((c for c in alike if c.way == RIVAL), next(iter(alike), None))
        found.append(cell._replace(ratio=base.ms / cell.ms) if base and cell.ms and len(alike) > 1 else cell)
    return found


def table(cells: list[Cell]) -> str:
    """Markdown, a row a way and shape."""
    header = ["prompts x tokens", "way", "tokens/s", "ms a pass", "ms a layer", "host ms", "peak GB", "times as fast"]
    rows = []
    for cell in sorted(cells, key=lambda cell: (cell.batch, cell.length)):
        values = [(cell.tokens_per_second, ".0f"), (cell.ms, ".2f"), (cell.layer_ms, ".3f"), (cell.host_ms, ".2f")]
        values += [(cell.peak_gb, ".1f"), (cell.ratio, ".2f")]
        shown = [format(value, form) if value is not None else "-" for value, form in values]
        rows.append([f"{cell.batch}x{cell.length}", cell.way, *shown])
    return markdown(header, rows)


def parts_table(cells: list[Cell], on_gpu: bool) -> str:
    """Markdown: microseconds a layer by part, and shares of it, a column a way and shape; empty if not asked for."""
    profiled = [cell for cell in cells if cell.parts]
    if not profiled:
        return ""
    own = [part for part in PARTS if any(part in cell.parts for cell in profiled)]
    header = [f"us a layer (share), {'by kernels' if on_gpu else 'of the host'}"]
    header += [f"{cell.batch}x{cell.length} {cell.way.removeprefix(OURS).strip(', ')}" for cell in profiled]
    rows = []
    for part in own:
        values = [(cell.parts.get(part, 0.0), cell.layer_ms) for cell in profiled]
        rows.append([part, *(f"{ms * 1e3:.1f} ({ms / whole:.1%})" for ms, whole in values)])
    sums = [(sum(cell.parts.get(part, 0.0) for part in own), cell.layer_ms) for cell in profiled]
    rows.append(["**sum**", *(f"{ms * 1e3:.1f} ({ms / whole:.1%})" for ms, whole in sums)])
    rows.append(["**measured**", *(f"{whole * 1e3:.1f}" for _, whole in sums)])
    return markdown(header, rows)


def plot(cells: list[Cell], path: str, title: str) -> None:
    """Tokens a second: a panel a model, a group of bars a shape, a bar a way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(cell.model for cell in cells))
    figure, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 5), squeeze=False, layout="constrained")
    for axis, model in zip(axes.flat, models, strict=True):
        of_model = [cell for cell in cells if cell.model == model and cell.ms]
        shapes = list(dict.fromkeys((cell.batch, cell.length) for cell in of_model))
        ways = list(dict.fromkeys(cell.way for cell in of_model))
        for index, way in enumerate(ways):
            points = [(shapes.index((c.batch, c.length)), c.tokens_per_second) for c in of_model if c.way == way]
            width = 0.8 / len(ways)
            bars = axis.bar([at + index * width for at, _ in points], [y for _, y in points], width, label=way)
            axis.bar_label(bars, fmt="%.0f", fontsize=7)
        axis.set_xticks([at + 0.4 for at in range(len(shapes))], [f"{b}x{n}" for b, n in shapes])
        axis.set(xlabel="prompts x tokens", ylabel="tokens/s", title=model)
        axis.legend(fontsize=7)
    figure.suptitle(title, fontsize=7, wrap=True)
    write_plot(figure, path)


def report(args: argparse.Namespace, found: dict[str, str], cells: list[Cell], notes: dict[str, list[str]]) -> None:
    for model, said in notes.items():
        of_model = [cell for cell in cells if cell.model == model]
        say(f"## {model}, {args.dtype}\n\n" + "\n".join(f"- {line}" for line in said))
        if args.layers:
            say("- a pass is scaled from the layers that ran to all of them; host ms, peak GB and parameters are not")
        say(f"\n{table(of_model)}\n")
        parts = parts_table(of_model, "link" in found or "driver" in found)
        if parts:
            say(f"{parts}\n\nReductions by a recipe include what they are one kernel with: addition and next norm.\n")
        for cell in (cell for cell in of_model if cell.note):
            say(f"Not measured: {cell.way} at {cell.batch}x{cell.length}: {cell.note}")
    if args.json:
        listed = [cell._asdict() | {"tokens_per_second": cell.tokens_per_second} for cell in cells]
        content = {"conditions": found, "layers": args.layers, "notes": notes, "cells": listed}
        write_json(args.json, content)
    if args.plot:
        plot(cells, args.plot, in_words(found))
