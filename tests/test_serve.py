"""bench_inference.py serve and prefix in small: loads are served alike on all ranks, soaks see what does not hold."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import serve_jobs as jobs
from serve_load import Load

TOOL = Path(__file__).parent.parent / "tools" / "bench_inference.py"

SHORT = ["--prompt-tokens", "2", "40", "--new-tokens", "3", "30", "--max-requests", "3", "--max-tokens", "32"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_load_is_served(world, tmp_path, ranks):
    arguments = [*SHORT, "--rates", "5", "40", "--seconds", "1"]
    report, error = world(ranks).run(jobs.ran, "serve", arguments, tmp_path / "x.json")[0]
    slow, fast = report["rows"]
    assert not error and 1 <= slow["requests"] < fast["requests"] and slow["idle"] > fast["idle"] >= 0
    for row in (slow, fast):
        assert 0 < row["ttft_ms"][0] <= row["ttft_ms"][1] and 0 < row["tpot_ms"][0] <= row["tpot_ms"][1]
        assert row["tokens_per_second"] * row["seconds"] >= 3 * row["requests"]


def test_as_many_requests_as_are_asked_for(world, tmp_path):
    report, _ = world(1).run(jobs.ran, "serve", [*SHORT, "--rates", "20", "90", "--requests", "9"], tmp_path / "x")[0]
    assert [row["requests"] for row in report["rows"]] == [9, 9]


def test_a_broadcast_a_step(world, tmp_path):
    """The clock is told once before each step, nap and the end; by one group, whatever the number of loads."""
    arguments = [*SHORT, "--rates", "20", "60", "--requests", "8"]
    for broadcasts, steps, naps, said in world(2).run(jobs.counted, arguments, tmp_path / "x.json"):
        assert broadcasts == steps + naps + 2 and steps > 16 and naps > 0
        assert any("a broadcast of rank 0's clock before every step is included" in line for line in said)
    [(broadcasts, *_, said)] = world(1).run(jobs.counted, arguments, tmp_path / "x.json")
    assert broadcasts == 0 and not any("broadcast" in line for line in said)


def test_a_soak_of_all_kinds_holds(world, tmp_path):
    arguments = [*SHORT, "--max-tokens", "5", "--soak", "5", "--rates", "45"]  # prompts are read in parts
    [(report, failure)] = world(1).run(jobs.ran, "serve", arguments, tmp_path / "x.json")
    [row] = report["rows"]
    assert not failure and row["accepted"] == row["answered"] + sum(row["cancelled"].values())
    assert row["cancelled"].keys() == {"waiting", "reading", "decoding"}
    assert row["refused"].keys() == {"prompts[0]", "num_tokens_to_generate", "temperature", "top_p"}


def test_a_soak_of_two_ranks_holds(world, tmp_path):
    arguments = [*SHORT, "--max-tokens", "16", "--soak", "4", "--rates", "15"]
    report, failure = world(2).run(jobs.ran, "serve", arguments, tmp_path / "x.json")[0]
    [row] = report["rows"]
    assert not failure and row["answered"] and row["cancelled"] and row["refused"]


@pytest.mark.parametrize(
    ("defect", "found"),
    [
        ("slots", "slots"),
        ("unanswered", "unanswered"),
        ("host memory", "host memory"),
        ("stalled", "stalled, unanswered"),
        ("taken", "refusals"),
        ("turned away", "refusals"),
        ("states", "states"),
        ("no request came", "no request came"),
    ],
)
def test_a_soak_sees_what_does_not_hold(world, tmp_path, defect, found):
    arguments = [*SHORT, "--soak", "2", "--rates", "30", "--stall-seconds", "1"]
    [(report, failure)] = world(1).run(jobs.soaked, arguments, tmp_path / "x.json", defect)
    assert failure == f"the soak of tiny does not hold: {found}" and report["rows"][0]["broken"] == found.split(", ")


def test_a_soak_that_fails_as_a_command(tmp_path):
    config, report = tmp_path / "config.json", tmp_path / "x.json"
    config.write_text(json.dumps(jobs.jobs.FALCON))
    asked = ["serve", "--models", config, "--soak", "1", "--rates", "40", "--stall-seconds", "1e-9", "--json", report]
    done = subprocess.run([sys.executable, TOOL, *map(str, asked), *SHORT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert done.stderr == f"error: the soak of {tmp_path.name} does not hold: stalled, unanswered\n"
    assert json.loads(report.read_text())["rows"][0]["broken"] == ["stalled", "unanswered"]


def test_a_load_is_the_same_on_every_rank_and_of_all_kinds():
    def drawn() -> list:
        return list(itertools.islice(Load(10.0, (1, 50), (1, 20), 101, 7, mixed=True).arrivals(), 400))

    first, second = drawn(), drawn()
    assert [(a.at, a.prompt, vars(a.params)) for a in first] == [(a.at, a.prompt, vars(a.params)) for a in second]
    assert 30 < first[-1].at < 50  # 400 at 10 a second
    assert {a.gives_up for a in first} >= {None, ("waiting", 0)} and any(not a.prompt for a in first)
    assert {a.wrong for a in first} == {None, "prompts[0]", "num_tokens_to_generate", "temperature", "top_p"}
    assert {a.params.top_k for a in first} >= {0, 40, 5} and any(a.params.return_log_probs for a in first)


def test_a_kept_prefix_saves_time_and_changes_nothing(world, tmp_path):
    arguments = ["--prefixes", "700", "--suffix", "3", "--max-tokens", "128"]
    [(report, failure)] = world(1).run(jobs.ran, "prefix", arguments, tmp_path / "x.json")
    [row] = report["rows"]
    assert not failure and row["equal"] == 5 and row["hits"] == 6
    assert row["ratio"] == pytest.approx(row["cold_ms"] / row["warm_ms"]) and row["ratio"] > 1


def test_a_prefix_that_is_not_found(world, tmp_path):
    [(report, failure)] = world(1).run(jobs.forgetful, ["--prefixes", "64", "--suffix", "3"], tmp_path / "x.json")
    assert failure == "prefixes were not found: tiny, 64" and report["rows"][0]["hits"] == 0


def test_answers_that_differ_after_a_prefix_fail_in_float32_alone(world, tmp_path):
    for dtype, expected in (("float32", "answers after kept prefixes differ: tiny, 64"), ("bfloat16", None)):
        arguments = ["--prefixes", "64", "--suffix", "3", "--dtype", dtype]
        [(report, failure)] = world(1).run(jobs.corrupted, arguments, tmp_path / "x.json")
        assert failure == expected and report["rows"][0]["equal"] < 5


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("serve", ["--rates", "0"], "--rates=0.0: is out of range; legal: a positive number"),
        ("serve", ["--new-tokens", "9", "8"], "--new-tokens=8: is no number of tokens; legal: an integer from 9"),
        ("serve", ["--requests", "0"], "--requests=0: is no number of requests; legal: an integer from 1"),
        ("serve", ["--recipes", "auto", "auto"], "--recipes=['auto', 'auto']: are not compared here; legal: auto"),
        (
            "serve",
            ["--soak", "1", "--rates", "2", "3"],
            "--rates=[2.0, 3.0]: is not of a soak, which has one rate and no picture; legal: one rate, no --plot",
        ),
        ("serve", ["--seed", "-1"], "--seed=-1: is out of range; legal: an integer from 0 to 2^63 - 1"),
        ("prefix", ["--suffix", "0"], "--suffix=0: is no number of tokens; legal: an integer from 1"),
    ],
)
def test_mistakes(command, arguments, message):
    args = jobs.jobs.bench.read_args([command, *arguments])
    with pytest.raises(jobs.UserError) as error:
        jobs.jobs.bench.check(args, 1)
    assert str(error.value) == message
