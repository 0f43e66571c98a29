"""bench_inference.py serve and prefix in small: loads are served alike on all ranks, soaks see what does not hold."""

import itertools

import pytest
import serve_jobs as jobs
from serve_load import Load

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


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_soak_of_all_kinds_holds(world, tmp_path, ranks):
    arguments = [*SHORT, "--soak", "3", "--rates", "40"]
    report, error = world(ranks).run(jobs.ran, "serve", arguments, tmp_path / "x.json")[0]
    [row] = report["rows"]
    assert not error and row["accepted"] == row["answered"] + row["cancelled"] and row["cancelled"] > 0
    assert set(row["refused"]) > {"prompts[0]"} and sum(row["refused"].values()) > 2


@pytest.mark.parametrize("defect", ["slots", "unanswered", "host memory"])
def test_a_soak_sees_what_does_not_hold(world, tmp_path, defect):
    [(_, error)] = world(1).run(jobs.soaked, [*SHORT, "--soak", "1", "--rates", "30"], tmp_path / "x.json", defect)
    assert error.startswith(f"--soak='{defect}': does not hold; legal: none of unanswered, stalled")


def test_a_load_is_the_same_on_every_rank_and_of_all_kinds():
    def drawn() -> list:
        return list(itertools.islice(Load(10.0, (1, 50), (1, 20), 101, 7, mixed=True).arrivals(), 400))

    first, second = drawn(), drawn()
    assert [(a.at, a.prompt, vars(a.params)) for a in first] == [(a.at, a.prompt, vars(a.params)) for a in second]
    assert 30 < first[-1].at < 50  # 400 at 10 a second
    assert any(a.give_up_after for a in first) and any(not a.prompt for a in first)
    assert {a.params.top_k for a in first} >= {0, 40, 5} and any(a.params.return_log_probs for a in first)


def test_a_kept_prefix_saves_time_and_changes_nothing(world, tmp_path):
    arguments = ["--prefixes", "700", "--suffix", "3", "--max-tokens", "128"]
    [(report, error)] = world(1).run(jobs.ran, "prefix", arguments, tmp_path / "x.json")
    [row] = report["rows"]
    assert not error and row["equal"] == 5 and row["warm_ms"] < row["cold_ms"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("serve", ["--rates", "0"], "--rates=0.0: is out of range; legal: a positive number"),
        ("serve", ["--new-tokens", "9", "8"], "--new-tokens=8: is no number of tokens; legal: an integer from 9"),
        ("serve", ["--recipes", "none", "none"], "--recipes=['none', 'none']: are not compared here; legal: none"),
        ("prefix", ["--suffix", "0"], "--suffix=0: is no number of tokens; legal: an integer from 1"),
    ],
)
def test_mistakes(command, arguments, message):
    args = jobs.jobs.bench.read_args([command, *arguments])
    with pytest.raises(jobs.UserError) as error:
        jobs.jobs.bench.check(args, 1)
    assert str(error.value) == message
