"""The tools that time and soak all-reduces, in small: tables, checks that see what is wrong, a rank that is killed."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace

import bench_jobs as jobs
import pytest
from bench_jobs import bench, soak_allreduce, tune_allreduce
from soak_calls import Choices

from megatron_ssm_tp import UserError

ROOT = Path(__file__).parent.parent
FORMATS = ("bf16", "int8", "fp8", "int4")


def _torchrun(tool: str, *args: object) -> subprocess.CompletedProcess:
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "tools" / tool), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def _without_launcher(*command: str) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of two ranks, of which nobody ends one when the other has ended."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT / "tests",
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


def test_a_bench_that_measured_nothing_leaves_an_earlier_report_alone(monkeypatch, tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    report = tmp_path / "x.json"
    report.write_text("earlier")
    monkeypatch.setattr(bench, "start", lambda timeout_s: jobs.CPU)
    monkeypatch.setattr(bench, "agree", lambda *_: None)
    monkeypatch.setattr(bench, "Ways", lambda *_: SimpleNamespace(missing={}))
    monkeypatch.setattr(bench, "measure_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.read_args(["--json", str(report)]))
    assert report.read_text() == "earlier"


def test_bench_on_two_ranks(tmp_path):
    """Conditions, a row a way, a filled cell a size, errors of the size that each format has; the same in JSON."""
    file = tmp_path / "bench.json"
    done = _torchrun("bench_allreduce.py", "--tokens", 1, 8, "--hidden", 128, 256, "--json", file)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d{4}-\d\d-\d\d, ranks 2, backend gloo, device CPU .*torch ", done.stdout)
    report = json.loads(file.read_text())
    assert report["conditions"]["backend"] == "gloo" and "symm_mem" in report["missing"]
    assert "- symm_mem: needs GPUs" in done.stdout and "- symmetric: n" in done.stdout
    cells = {(c["table"], c["hidden"], c["tokens"], c["way"]): c for c in report["cells"]}
    errors = {"gloo": 4e-3, "bf16 collective": 4e-3, "int8 collective": 0.1, "fp8 collective": 0.03}
    for hidden in (128, 256):
        for tokens in (1, 8):
            for way, limit in {**errors, "int4 collective": 1.0}.items():
                cell = cells["sum", hidden, tokens, way]
                assert cell["us"] > 0 and cell["same_bits"] is True and 0 < cell["error"] < limit
                assert f"{cell['us']:.1f} ({cell['ratio']:.2f})" in done.stdout
                assert cell["ratio"] == pytest.approx(cells["sum", hidden, tokens, "gloo"]["us"] / cell["us"])
            assert cells["fused", hidden, tokens, "gloo, add-norm kernel"]["error"] < 4e-3
    assert sum(line.startswith("| ") for line in done.stdout.splitlines()) == 2 * (2 + 5 + 2 + 1)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (bench, ["--ways", "tcp"], "--ways='tcp': unknown; legal: nccl, symm_mem, collective, symmetric, fused"),
        (bench, ["--tokens", "0"], "--tokens=0: is too few; legal: integers from 1"),
        (bench, ["--hidden", "4"], "--hidden=4: is too few"),
        (bench, ["--block-size", "3"], "--block-size=3: no size of a block; legal: 16, 32"),
        (bench, ["--json", "/nowhere/x"], "--json='/nowhere/x': cannot be written"),
        (tune_allreduce, ["--recipes", "int9"], "--recipes='int9': unknown format; legal: bf16, int8, fp8, int4"),
        (tune_allreduce, ["--hidden", "-3"], "--hidden=-3: no row of whole blocks that a program can hold; legal: mul"),
        (tune_allreduce, ["--tokens", "1", "0"], "--tokens=0: is too few; legal: integers from 1"),
        (tune_allreduce, ["--table", "/nowhere/x"], "--table='/nowhere/x': cannot be written"),
        (soak_allreduce, ["--minutes", "0"], "--minutes=0.0: leaves nothing to do"),
        (soak_allreduce, ["--kill-after", "-1"], "--kill-after=-1.0"),
        (soak_allreduce, ["--backends", "tcp"], "--backends='tcp': unknown; legal: auto, symmetric, collective"),
        (soak_allreduce, ["--block-sizes", "100"], "--block-sizes=100: no size of a block; legal: 16, 32"),
    ],
)
def test_mistakes_in_options(module, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        module.check(module.read_args(arguments))


def test_what_needs_gpus_says_so_on_all_ranks_before_any_work(world):
    needs = "needs GPUs; legal: GPUs of one node with peer access: only they are tuned"
    assert world(2).run(jobs.error_of, "tune_allreduce", []) == 2 * [f"backend='symmetric': {needs}"]
    error = "--backends='symmetric': needs GPUs; legal: auto, collective"
    assert world(2).run(jobs.error_of, "soak_allreduce", ["--backends", "symmetric"]) == 2 * [error]


def test_a_way_that_fails_on_one_rank_is_a_note_on_all(world):
    mine, theirs = world(2).run(jobs.measured, 0)
    [cell] = mine
    assert cell.note.startswith("ValueError: a way's own error (bench_jobs.py:") and cell.us is None
    assert [cell.note for cell in theirs] == ["failed on another rank"]
    assert f"- a way (all-reduce): {cell.note}; at 2 x 3" in bench.notes(mine, {})
    assert "| a way | - | - | - |" in bench.tables(mine, 3)
    [[cell], _] = world(2).run(jobs.measured, None)
    assert cell.us > 0 and cell.error == 0 and cell.same_bits and not cell.note


def test_different_bits_show_in_the_table():
    cells = [bench.Cell("sum", 3, n, "a way", False, 1.0, 0.1, same) for n, same in ((1, True), (2, False))]
    assert "| a way | 1.0 | 1.0 | 1.0e-01 | NOT at 2 |" in bench.tables(cells, 3)


def test_the_plot(tmp_path):
    cells = [bench.Cell("sum", h, n, w, w == "a", n) for h in (3, 4) for n in (1, 2) for w in "ab"]
    bench.plot([*cells, bench.Cell("fused", 3, 1, "c", False, note="not here")], str(tmp_path / "x.png"), "title")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_seed_is_the_same_calls():
    def drawn(seed: int) -> list:
        rng, choices = Random(seed), Choices(2, ("collective", "auto"))
        return [choices.draw(rng, 1 << 24) for _ in range(300)]

    calls = drawn(1)
    assert calls == drawn(1) and calls != drawn(2)
    assert {call.recipe.name for call in calls} == set(FORMATS) and {call.group for call in calls} == {0, 1}
    assert min(call.rows * call.columns for call in calls) < 8 < 1 << 22 < max(c.rows * c.columns for c in calls)
    plain = [call for call in calls if not call.fused]
    assert len(plain) < len(calls) and any(call.exact_columns for call in plain) and any(c.specials for c in calls)
    assert any(call.stride > call.columns for call in plain) and any(call.columns % 2 for call in plain)


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_soak_passes(world, ranks):
    for passed, failures, text in world(ranks).run(jobs.soaked, calls=300):
        assert passed, failures
        assert re.search(r"PASS: \d{3} calls, 0 failures", text) and text.count("| eager | collective | sum |") == 4


@pytest.mark.parametrize("fault", jobs.FAULTS)
def test_a_soak_sees(world, fault):
    for passed, failures, text in world(2).run(jobs.soaked, fault):
        assert not passed and "\nFAIL: " in text
        expected = "differs between ranks (0, 1)" if "bit" in fault else "times its bound off"
        assert any(expected in failure for failure in failures)
        assert all(int(re.match(r"call (\d+), eager", failure)[1]) >= 50 for failure in failures)


def test_a_soak_under_torchrun():
    done = _torchrun("soak_allreduce.py", "--minutes", 0.05, "--max-values", 4096)
    assert done.returncode == 0, done.stderr
    assert "Without symmetric (" in done.stdout and re.search(r"PASS: \d+ calls, 0 failures", done.stdout)


def test_a_failed_soak_ends_with_status_1():
    call = "import bench_jobs; bench_jobs.faulty_soak(['--calls', '100', '--max-values', '999'])"
    (status, said, _), (other, silent, _) = _without_launcher("-c", call)
    assert (status, other) == (1, 1) and "FAIL: " in said and not silent


def test_when_the_last_rank_is_killed_the_other_says_so():
    began, tool = time.monotonic(), str(ROOT / "tools" / "soak_allreduce.py")
    (status, _, error), (killed, _, _) = _without_launcher(tool, "--kill-after", "1", "--timeout-s", "20")
    assert (status, killed) == (1, -9) and time.monotonic() - began < 40
    [line] = [line for line in error.splitlines() if line.startswith("error:")]
    said = r"error: rank 0: another rank ended or cannot be reached \([^/]*\), (\d+\.\d) s after the kill"
    found = re.fullmatch(said, line)
    assert found and float(found[1]) < 20
