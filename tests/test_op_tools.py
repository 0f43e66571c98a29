"""check_ops.py and bench_ops.py in small, in Triton's interpreter: what is wrong is seen, what is counted is right."""

import re
import subprocess
import sys
from pathlib import Path

import op_tool_jobs as jobs
import pytest
import torch
from op_cases import Case, call, draw, exact
from op_floor import Floor, bytes_of, floor_of, special_functions
from op_tool_jobs import HALF, bench_ops, check_ops

from megatron_ssm_tp import UserError
from megatron_ssm_tp.ops import reference


def test_sound_operators_pass(interpreted):
    pytest.importorskip("triton")
    assert interpreted(jobs.checked) == []


@pytest.mark.parametrize("fault", jobs.FAULTS)
def test_a_fault_is_seen_in_every_case(interpreted, fault):
    pytest.importorskip("triton")
    failures = interpreted(jobs.checked, fault)
    assert len(failures) == len(jobs.WORKS) and all("WRONG: " in line and fault in line for line in failures)


def test_bfloat16_is_held_to_the_rivals_error():
    half, single = (Case("scan", (1000,), 64, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    good, bad = (check_ops.Checked(error, 1e-7, 1e-3, 1e-3) for error in (1.09e-3, 1.11e-3))
    assert good.verdict(half) == "" and "y is off by more than 1.1 times theirs" in bad.verdict(half)
    assert bad.verdict(Case("scan", (63,), 64)) == ""
    assert "times theirs" not in check_ops.Checked(1e-6, 1e-7, 1e-6, 1e-7).verdict(single)
    assert "nan" in check_ops.line(check_ops.Work(half), good._replace(y=float("nan")))
    assert good._replace(y=float("nan")).verdict(half) and good._replace(state=float("nan")).verdict(half)


def test_all_cases_are_there():
    """Of the lengths, states and splits that are promised, none is lost."""
    works = list(check_ops.all_work())
    for dtype in (torch.float32, torch.bfloat16):
        cases = [work.case for work in works if work.case.dtype == dtype]
        assert {case.lengths for case in cases} >= {(n,) for n in (1, 2, 64, 65, 1000, 65536)}
        assert {case.width for case in cases if case.is_scan} >= {8, 16, 64, 128}
        assert {case.op for case in cases if case.initial} == set(bench_ops.FUNCTIONS)
        [every, _] = [work.cuts for work in works if work.case.dtype == dtype and len(work.cuts) > 1][:2]
        assert every == tuple((at,) for at in range(1, 97))
    float16 = [work.case for work in works if work.case.dtype == torch.float16]
    assert {case.op for case in float16} == set(bench_ops.FUNCTIONS)
    wide = {(case.dtype, case.channels) for work in works if 1000 in (case := work.case).lengths and case.op == "conv"}
    assert {(dtype, channels) for dtype in (HALF, torch.float16) for channels in (8192, 8200)} <= wide
    assert len(set(works)) == len(works)


@pytest.mark.parametrize("op", ["scan", "conv"])
def test_the_truth_is_float64(op):
    """In float32 the reference differs from it; of the first channels alone it is the same."""
    case = Case(op, (40, 3), 6, 4, torch.float32, initial=True)
    given = draw(case, jobs.CPU)
    y, states = exact(case, given)
    few, _ = exact(case, given, 2)
    assert y.dtype == states.dtype == torch.float64 and torch.equal(few, y[:, :2])
    assert torch.equal(given.states, draw(case, jobs.CPU).states)
    single = call(case, getattr(reference, bench_ops.FUNCTIONS[op]), given)
    assert 0 < (single.double() - y).norm() / y.norm() < 1e-6 and torch.equal(single, y.float()) is False


def test_the_work_and_its_floor():
    scan = Case("scan", (8192,), 8192)
    assert bytes_of(scan) == 8192 * (4 * 8192 + 32) * 2 + (3 * 8192 * 16 + 2 * 8192) * 4
    assert special_functions(scan) == 8192 * 8192 * 19
    step = Case("scan step", (1,) * 8, 8192)
    assert bytes_of(step) == 8 * (4 * 8192 + 32) * 2 + (17 * 8192 * 16 + 2 * 8192) * 4
    conv = Case("conv", (2048,) * 8, 4096, 4)
    assert bytes_of(conv) == (2 * 16384 * 4096 + 5 * 4096 + 2 * 8 * 4096 * 4) * 2
    floor = floor_of(jobs.CPU, 3.0, 2.0, 8192)
    assert floor.special == 132 * 16 * 2e9 and "3 TB/s" in floor.words and "2.000 GHz, given" in floor.words
    assert floor.seconds(scan) == special_functions(scan) / floor.special > bytes_of(scan) / 3e12
    assert floor.seconds(conv) == bytes_of(conv) / 3e12 and "1.755 GHz, assumed" in floor_of(jobs.CPU, 3, None, 1).words


def test_without_a_bandwidth_it_is_a_copys():
    assert 1e9 < floor_of(jobs.CPU, None, 2.0, 1).bandwidth < 1e12


def test_rows_of_all_operators(interpreted):
    pytest.importorskip("triton")
    rows, text = interpreted(jobs.benched)
    assert [(row["case"]["op"], row["case"]["lengths"]) for row in rows] == [
        ("scan", (5, 5)),
        ("scan step", (1, 1, 1)),
        ("conv", (5, 5)),
        ("conv step", (1, 1, 1)),
    ]
    for row in rows:
        assert row["us"] > 0 and row["reference_us"] > 0 and row["theirs_us"] is None and row["note"] == ""
        assert 1e-5 < row["error"] < 3e-3 and row["state_error"] < 1e-5
        assert f"| {row['us']:.1f} | - | - | {row['reference_us']:.0f} |" in text


def test_what_fails_is_a_note(monkeypatch):
    """One operator's failure, and a reference that would take too long, leave the rest to be measured."""

    def ours(case: Case):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bench_ops, "ours", ours)
    monkeypatch.setattr(bench_ops, "_LARGEST_REFERENCE", 1)
    row = bench_ops.measure(Case("conv", (3,), 5, 4), Floor(1e12, 1e12, ""), jobs.CPU)
    assert row.us is None and "ours: RuntimeError: no kernel" in row.note
    assert "| conv | 5 | 4 | 1x3 | - | - |" in bench_ops.table([row])
    assert "- reference: too large to be timed; at conv 5 1x3" in bench_ops.notes([row])


def test_a_run_that_measured_nothing_leaves_an_earlier_report_alone(monkeypatch, tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    report = tmp_path / "x.json"
    report.write_text("earlier")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(bench_ops, "conditions", lambda device: {})
    monkeypatch.setattr(bench_ops, "floor_of", lambda *_: Floor(1e12, 1e12, ""))
    monkeypatch.setattr(bench_ops, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench_ops.run(bench_ops.read_args(["--json", str(report)]))
    assert report.read_text() == "earlier"


def test_theirs_as_a_ratio():
    row = bench_ops.Row(Case("scan", (8,), 8), 3000, 5000, 1.0, us=2.0, theirs_us=5.0)
    assert row.ratio == 2.5 and "| 2.0 | 5.0 | 2.50 | - | 2 | 0.0 | 0.0 | 1.0 | 50% |" in bench_ops.table([row])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "scam"], "--ops='scam': unknown; legal: 'scan', 'scan step'"),
        (["--shapes", "8x"], "--shapes='8x': is no batch of prompts"),
        (["--channels", "0"], "--channels=0: is too few"),
        (["--d-state", "0"], "--d-state=0: is too few"),
        (["--clock", "0"], "--clock=0.0: bounds nothing"),
        (["--json", "/nowhere/x"], "--json='/nowhere/x': cannot be written"),
    ],
)
def test_mistakes_in_options(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bench_ops.read_cases(bench_ops.read_args(arguments))


@pytest.mark.parametrize("tool", ["bench_ops", "bench_ssd", "check_gradients", "check_ops"])
def test_without_a_gpu_the_error_is_all_that_is_said(tool):
    command = [sys.executable, Path(bench_ops.__file__).with_name(f"{tool}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: [^\n]* GPU[^\n]*\n", done.stderr)


def test_the_plot(tmp_path):
    rows = [bench_ops.Row(Case("scan", (n,), 8), 1, 1, 2.0, us=4.0, theirs_us=t) for n, t in ((1, 5.0), (2, None))]
    bench_ops.plot(rows, str(tmp_path / "x.png"), "title")
    assert (tmp_path / "x.png").stat().st_size > 1000
