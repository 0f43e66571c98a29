"""The tools that measure what recipes cost in quality: their metrics, the choice of sites, and both of them run."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ssm_tp import Bf16, Int4BlockScaling, Int8BlockScaling, RecipeBook, UserError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import calibrate_allreduce as calibrate  # noqa: E402
import eval_quality  # noqa: E402
import quality  # noqa: E402

CHECKPOINT = ROOT / "examples" / "checkpoints" / "mamba-kjv-2.7m"
INT8, INT4 = Int8BlockScaling(), Int4BlockScaling()
SITES = [quality.Site("decoder.layers.0.mixer.out_proj", 240, 1), quality.Site("decoder.layers.0.mixer.x_proj", 47, 2)]


def _logits() -> torch.Tensor:
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))


def test_equal_logits_are_no_damage():
    found = quality.score(_logits(), _logits(), torch.zeros(2, 5, dtype=torch.long))
    assert (found.tokens, found.kl, found.agreement, found.change) == (10, 0, 100, 0)
    assert found.perplexity > 1


def test_permuted_logits_are_the_damage_that_is_written_out():
    p, targets = _logits(), torch.arange(10).view(2, 5) % 7
    q = p.roll(1, -1)
    found = quality.score(p, q, targets)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert found.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5)
    expected = torch.nn.functional.cross_entropy(q.double().flatten(0, 1), targets.flatten()).exp().item()
    assert found.perplexity == pytest.approx(expected, rel=1e-5) and found.agreement == 0
    plain = quality.score(p, p, targets).perplexity
    assert found.change == pytest.approx(100 * (expected / plain - 1), rel=1e-4)


def test_scores_of_parts_add_up():
    p, q, targets = _logits(), _logits().roll(1, -1), torch.zeros(2, 5, dtype=torch.long)
    parts = quality.score(p[:1], q[:1], targets[:1]).plus(quality.score(p[1:], q[1:], targets[1:]))
    assert parts == pytest.approx(quality.score(p, q, targets))


def test_windows_are_spread_and_do_not_overlap():
    windows = quality.cut(list(range(101)), 3, 20, "--text")
    assert windows.shape == (3, 21) and windows[:, 0].tolist() == [0, 20, 60]
    with pytest.raises(UserError, match="--windows=6: the text has 5 of 20 tokens; legal: 1 to 5"):
        quality.cut(list(range(101)), 6, 20, "--text")
    with pytest.raises(UserError, match="has 20 tokens"):
        quality.cut(list(range(20)), 1, 20, "--text")


def test_bytes_on_the_wire():
    """x_proj's stay plain, the last block counts whole, and below min_bytes all is plain."""
    book = RecipeBook.everywhere(INT8)
    assert quality.bytes_a_token(SITES, None, 10, 2) == 480 + 2 * 94
    assert quality.bytes_a_token(SITES, book, 10, 2) == 19 * 132 / 10 + 2 * 94
    assert quality.bytes_a_token(SITES, RecipeBook.everywhere(Int8BlockScaling(min_bytes=4801)), 10, 2) == 668
    assert quality.bytes_a_token(SITES, RecipeBook.everywhere(Bf16(block_size=16)), 10, 2) == 668


def _move(site: str, recipe, saved: float, kl: float) -> calibrate.Move:
    return calibrate.Move(site, recipe, saved, quality.Score(1, 0, 0, kl, 1))


# The cost of a byte rises from a to d; b has two recipes; e saves nothing.
MOVES = [
    _move("d", INT8, 100, 5.0),
    _move("b", INT4, 150, 3.0),
    _move("b", INT8, 100, 0.2),
    _move("e", INT8, 0, 0.0),
    _move("a", INT8, 100, 0.1),
]


def _sum_of_damages(choice: calibrate.Choice) -> quality.Score:
    return quality.Score(1, 0, 0, sum(m.damage.kl for m in MOVES if choice.get(m.site) == m.recipe), 1)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0.05, {}),
        (0.1, {"a": INT8}),
        (1.0, {"a": INT8, "b": INT8}),
        (4.0, {"a": INT8, "b": INT4}),
        (100.0, {"a": INT8, "b": INT4, "d": INT8}),
    ],
)
def test_the_cheapest_sites_are_chosen_within_the_budget(budget, expected):
    choice, damage = calibrate.choose(MOVES, budget, _sum_of_damages)
    assert choice == expected
    assert damage is None if not expected else damage.kl <= budget


def test_a_combination_that_costs_more_than_its_parts_is_cut_back():
    choice, damage = calibrate.choose(MOVES, 1.0, lambda choice: quality.Score(1, 0, 0, 0.9 ** (2 - len(choice)), 1))
    assert choice == {"a": INT8, "b": INT4} and damage.kl == 1
    assert calibrate.choose(MOVES, 1.0, lambda choice: quality.Score(1, 0, 0, 2, 1)) == ({}, None)


def test_the_file_gives_each_site_its_recipe(tmp_path):
    x_proj = SITES[1].name
    choice = {SITES[0].name: Int4BlockScaling(block_size=32), x_proj: Int8BlockScaling(min_bytes=7)}
    (tmp_path / "recipes.yaml").write_text(calibrate.recipe_text(choice, ["a note: with a colon"]))
    book = RecipeBook.from_yaml_file(tmp_path / "recipes.yaml")
    assert {site: book.recipe_for(site) for site in choice} == choice
    assert book.recipe_for("decoder.layers.1.mixer.out_proj") is None
    (tmp_path / "none.yaml").write_text(calibrate.recipe_text({}, []))
    assert RecipeBook.from_yaml_file(tmp_path / "none.yaml").recipe_for(x_proj) is None


def test_places_of_sites():
    assert calibrate.place("decoder.layers.12.mixer.out_proj") == ("mixer.out_proj", 12)
    assert calibrate.place("decoder.shared_blocks.1.mlp.down") == ("shared mlp.down", 1)


def test_mistakes_in_options(monkeypatch, tmp_path):
    given = ["--load", ".", "--data", "x", "--budget"]
    for arguments, message in (
        ([*given, "0"], "--budget=0.0: no budget"),
        ([*given, "nan"], "--budget=nan: no budget"),
        ([*given, "1", "--recipe", "none"], "--recipe='none': quantizes nothing"),
        ([*given, "1", "--recipe", "int5"], "^--recipe='int5': unknown format; legal: bf16, int8, fp8, int4"),
        ([*given, "1", "--block-size", "3"], "^--block-size=3: no size of a block"),
        ([*given, "1", "--out", str(tmp_path / "no" / "x")], "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            calibrate.recipes_of(calibrate.read_args(arguments))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="matplotlib is not installed"):
        calibrate.recipes_of(calibrate.read_args([*given, "1", "--plot", str(tmp_path / "x.png")]))
    for arguments, message in (
        (["--recipes", "int8", "int7"], "^--recipes='int7': unknown format; legal: none, bf16"),
        (["--block-size", "100"], "^--block-size=100: no size of a block"),
    ):
        with pytest.raises(UserError, match=message):
            eval_quality.books_of(eval_quality.read_args(["--load", ".", "--text", "x", *arguments]))


def test_ranks_that_cannot_share_the_model_are_said_by_the_launchers_option(monkeypatch):
    group = SimpleNamespace(size=lambda: 7)
    monkeypatch.setattr(quality, "join", lambda tp: (torch.device("cpu"), SimpleNamespace(tp=group)))
    monkeypatch.setattr(quality, "agree", lambda step, group: step())
    with pytest.raises(UserError, match=r"^--nproc-per-node=7: "):
        quality.open_setting(eval_quality.read_args(["--load", str(CHECKPOINT), "--text", "x"]))


def _torchrun(tool: str, *args: object) -> subprocess.CompletedProcess:
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "tools" / tool), "--load", str(CHECKPOINT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def test_both_tools_on_two_ranks(tmp_path):
    """Sites are chosen and written; the file, evaluated on the same windows, does the damage that was measured."""
    text, recipes, report = tmp_path / "text.txt", tmp_path / "recipes.yaml", tmp_path / "report.json"
    text.write_text("And God said unto Moses, Go in unto Pharaoh, and speak unto him.\n" * 12)
    pieces = ["--windows", 2, "--seq-len", 24]
    done = _torchrun("calibrate_allreduce.py", "--data", text, *pieces, "--budget", 0.01, "--out", recipes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| decoder.layers.") == 12 and "of 12 sites quantized" in done.stdout
    options = ["--recipes", "int8", "--tp-allreduce-cfg", recipes, "--json", report]
    done = _torchrun("eval_quality.py", "--text", text, *pieces, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())["recipes"]
    assert list(found) == ["none", "int8, block 128", "recipes.yaml"] and found["none"]["to_plain"]["kl"] == 0
    assert 0 < found["recipes.yaml"]["to_plain"]["kl"] <= 0.01 and found["none"]["to_float32"]["kl"] > 0
    assert found["none"]["bytes_a_token"] == 6 * 2 * (240 + 47) and math.isfinite(found["none"]["to_plain"]["change"])


def test_a_mistake_is_one_line(tmp_path):
    done = _torchrun("eval_quality.py", "--text", tmp_path / "missing.txt")
    assert done.returncode != 0 and "exitcode  : 2" in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "--text=" in line and "legal: a UTF-8 text file" in line
