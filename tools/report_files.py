"""What tools write when they have measured: JSON and pictures, checked before the work, whole or not at all."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ssm_tp.cli.files import check_writable, whole_file, write_whole
from megatron_ssm_tp.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_reports(json_path: str | None, plot_path: str | None = None) -> None:
    """Raises UserError: --json or --plot could only fail after the work."""
    check_writable("--json", json_path)
    check_writable("--plot", plot_path)
    if plot_path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot", plot_path, "matplotlib is not installed", "pip install matplotlib, or no --plot")
    from matplotlib.backend_bases import FigureCanvasBase

    known = [f".{name}" for name in FigureCanvasBase.get_supported_filetypes()]
    if Path(plot_path).suffix.lower() not in known:
        raise UserError("--plot", plot_path, "is of no format that can be drawn", ", ".join(known))


def write_json(path: str | None, content: dict, indent: int = 1) -> None:
    if path is not None:
        write_whole("--json", path, json.dumps(content, indent=indent) + "\n")


def write_plot(figure: "Figure", path: str) -> None:
    """The figure, in the format that the path ends with."""
    with whole_file("--plot", path) as partial:
        figure.savefig(partial, format=Path(path).suffix.removeprefix(".").lower(), dpi=120)
