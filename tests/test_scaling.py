"""bench_inference.py scaling and requests in small: figures of several numbers of ranks, and their ratios to one."""

import json
import subprocess
import sys
from pathlib import Path

import bench_inference_jobs as jobs
import pytest
import scaling_bench
import serve_jobs
from scaling_bench import REPLICAS, Found

from megatron_ssm_tp import UserError

TOOL = Path(__file__).parent.parent / "tools" / "bench_inference.py"


def test_whole_requests(world, tmp_path):
    arguments = ["--shapes", "1x20", "2x9", "--new-tokens", "5", "--max-tokens", "16"]
    for ranks, more in ((1, []), (2, ["--recipes", "none", "int8"])):
        report, error = world(ranks).run(serve_jobs.ran, "requests", [*arguments, *more], tmp_path / "x.json")[0]
        expected = [(recipe, *shape) for recipe in more[1:] or ["auto"] for shape in ((1, 20), (2, 9))]
        assert not error and [(c["recipe"], c["batch"], c["length"]) for c in report["cells"]] == expected
        assert all(cell["seconds"] > 0 for cell in report["cells"])


def config_in(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(jobs.FALCON))
    return folder / "config.json"


def scaling_args(folder: Path, *arguments: str):
    sizes = ["--lengths", "8", "16", "--prompts", "1", "--batches", "2", "--new-tokens", "3", "--dtype", "float32"]
    sizes += ["--seconds", "0.1"]
    return ["scaling", "--models", str(config_in(folder)), *sizes, "--json", str(folder / "x.json"), *arguments]


def test_the_command_starts_what_measures(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, *scaling_args(tmp_path, "--ranks", "1")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["notes"] == [] and {f["what"] for f in report["found"]} == {"prefill", "decode", "requests"}
    assert "| prompt tokens | 1x8 |" in done.stdout and all(f["over_one_rank"] == 1 for f in report["found"])


def test_ranks_recipes_and_replicas_are_put_together(tmp_path, monkeypatch, capsys):
    """With processes that report at once: a rank does 10 a second, two do 16, or 18 by int8; one part fails."""

    def start(command, options, ranks, report, gpu=None):
        cells = []
        for way, speed in (("auto", 16), ("int8", 18)) if ranks > 1 else (("auto", 10),):
            for batch, length in [(2, 1)] if command == "decode" else [(1, 8), (1, 16)]:
                count = batch * length if command == "prefill" else batch
                cells.append({"model": "m", "recipe": way, "batch": batch, "length": length, "seconds": count / speed})
        failing = command == "requests" and ranks > 1
        program = f"import sys; open({str(report)!r}, 'w').write({json.dumps({'cells': cells})!r})"
        program = "raise SystemExit('no room')" if failing else program
        return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)

    monkeypatch.setattr(scaling_bench, "_start", start)
    scaling_bench.run(
        jobs.bench.read_args(scaling_args(tmp_path, "--ranks", "1", "2", "--plot", str(tmp_path / "x.png")))
    )
    report = json.loads((tmp_path / "x.json").read_text())
    over = {(f["what"], f["shape"][1], f["ranks"], f["way"]): f["over_one_rank"] for f in report["found"]}
    for what, length in (("prefill", 8), ("prefill", 16), ("decode", 1)):
        ways = [over[what, length, 2, way] for way in ("auto", "int8", REPLICAS)]
        assert ways == pytest.approx([1.6, 1.8, 2.0])
    assert report["notes"] == ["requests on 2: ended with status 1: no room"]
    assert ("requests", 8, 2, REPLICAS) in over and ("requests", 8, 2, "auto") not in over
    assert "| 1: auto | 2: auto | 2: int8 | 2: replicas |" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_parts_alone():
    read = jobs.bench.read_args
    assert [command for command, _ in scaling_bench._parts(read(["scaling", "--what", "prefill"]), 2)] == [
        "prefill"
    ] * 2
    hybrid = ["scaling", "--models", "zamba2-7b", "mamba-2.8b"]
    (_, whole), (_, pure), (_, decode), (_, requests) = scaling_bench._parts(read(hybrid), 2)
    assert whole[:2] == ["--models", "zamba2-7b"] and "--passes" not in whole
    assert pure[:4] == ["--models", "mamba-2.8b", "--passes", "engine"]
    assert decode[:2] == requests[:2] == ["--models", "mamba-2.8b"]


def test_what_is_left_out_is_said():
    asked = ["scaling", "--models", "zamba2-7b", "mamba-2.8b", "--lengths", "2048", "16384"]
    assert scaling_bench._left_out(jobs.bench.read_args(asked)) == [
        "decode: not of zamba2-7b, whose engine is Megatron's",
        "requests: not of zamba2-7b, whose engine is Megatron's",
        "requests: not of 16384 tokens, but of 8192 at most",
    ]
    assert scaling_bench._left_out(jobs.bench.read_args([*asked, "--what", "prefill"])) == []


def test_ratios_and_longest_prompts():
    found = [Found("m", "prefill", (1, n), 1, "auto", 1000.0, peak) for n, peak in ((1000, 11.0), (2000, 12.0))]
    found += [Found("m", "prefill", (1, 2000), 2, "int8", 1700.0, 7.0), Found("m", "decode", (1, 1), 2, "auto", 9.0)]
    shown = scaling_bench.table(found)
    assert "| m | prompt tokens | 1x2000 | 1000 | - | 1700 (1.70) |" in shown
    assert "| m | tokens | 1x1 | - | 9.00 | - |" in shown
    assert scaling_bench.longest_prompts(found) == {("m", 1): 30000}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "4"], "--ranks=[2, 4]: has nothing to compare with; legal: 1 and others"),
        (["--ranks", "0", "1"], "--ranks=0: is no number of ranks; legal: an integer from 1"),
        (["--ranks", "1", "3"], "--ranks=3"),
        (["--what", "prefil"], "--what='prefil': is nothing that is measured here; legal: prefill, decode, requests"),
        (
            ["--what", "decode", "--models", "zamba2-7b"],
            "--what=['decode']: has nothing to measure: decode: not of zamba",
        ),
        (["--what", "decode", "--plot", "x.png"], "--plot='x.png': shows prefill of single prompts"),
        (["--lengths", "0"], "--lengths=0: is no number of tokens; legal: an integer from 1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError) as error:
        scaling_bench.check(jobs.bench.read_args(["scaling", *arguments]))
    assert message in str(error.value)
