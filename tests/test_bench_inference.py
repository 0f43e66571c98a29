"""bench_inference.py in small: passes are those of the model, tables and shares add up, mistakes are said at once."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import bench_inference_jobs as jobs
import pytest
import torch
from bench_inference_jobs import bench, bench_models, bench_shapes, decode_bench, inference_report
from layer_parts import OUTSIDE, by_part

from megatron_ssm_tp import UserError

TOOL = Path(__file__).parent.parent / "tools" / "bench_inference.py"


@pytest.mark.parametrize(
    ("raw", "layers", "passes"),
    [
        (jobs.FALCON, None, "whole"),
        (jobs.FALCON, 1, "whole"),
        (jobs.MAMBA2, None, "whole"),
        (jobs.ZAMBA2, 2, "whole"),
        (jobs.FALCON, None, "engine"),
        (jobs.MAMBA2, None, "engine"),
    ],
)
def test_a_pass_is_the_models(world, raw, layers, passes):
    """Logits of prompts packed together, at TP=2, are those of each prompt alone; also in a pass that is repeated."""
    assert max(world(2).run(jobs.prefill_error, raw, layers, 3, 20, passes)) < 1e-5


def test_cells_of_two_ranks(world):
    arguments = ["--shapes", "1x9", "2x4", "--recipes", "auto", "int8", "--layers", "2", "--parts"]
    cells, notes = world(2).run(jobs.benched, jobs.FALCON, arguments)[0]
    assert [(cell.batch, cell.length, cell.way) for cell in cells] == [
        (batch, length, way)
        for batch, length in ((1, 9), (2, 4))
        for way in ("megatron_ssm_tp", "megatron_ssm_tp, int8")
    ]
    assert notes[0].startswith("2 of 3 layers") and "runs on one GPU, and this is 2 ranks" in notes[1]
    for plain, int8 in (cells[:2], cells[2:]):
        assert plain.ratio == 1 and int8.ratio == pytest.approx(plain.ms / int8.ms) and not plain.note
        assert plain.ms > 3 * plain.layer_ms > 0 and plain.host_ms > 0
        assert plain.tokens_per_second == pytest.approx(plain.batch * plain.length * 1e3 / plain.ms)
        for cell in (plain, int8):
            expected = {"in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj", "reductions", "other"}
            assert expected < cell.parts.keys() and all(taken > 0 for taken in cell.parts.values())
    assert (
        f"| 2x4 | megatron_ssm_tp | {cells[2].tokens_per_second:.0f} | {cells[2].ms:.2f} |"
        in inference_report.table(cells)
    )
    shares = inference_report.parts_table(cells, on_gpu=False)
    assert "of the host | 1x9  | 1x9 int8 | 2x4  | 2x4 int8 |" in shares and "| scan | " in shares


def test_passes_of_our_engine_are_timed_beside_megatrons(world):
    arguments = ["--shapes", "2x9", "--passes", "whole", "engine", "--recipes", "auto", "int8", "--layers", "2"]
    cells, _ = world(2).run(jobs.benched, jobs.FALCON, arguments)[0]
    ways = ["megatron_ssm_tp" + more for more in ("", ", engine", ", int8", ", int8, engine")]
    assert [cell.way for cell in cells] == ways and all(cell.ms > cell.layer_ms > 0 for cell in cells)


@pytest.mark.parametrize("passes", ["halves", "x_proj"])
def test_parts_of_passes_that_hide_sums(world, passes):
    """Products whose sums are made elsewhere are parts all the same."""
    arguments = ["--shapes", "2x40", "--passes", "whole", passes, "--recipes", "auto", "--parts"]
    whole, hiding = world(2).run(jobs.benched, jobs.FALCON, arguments)[0][0]
    assert hiding.way == f"megatron_ssm_tp, {passes}" and whole.parts.keys() == hiding.parts.keys()
    assert all(hiding.parts[part] > 0.1 * whole.parts[part] for part in ("in_proj", "x_proj", "out_proj", "reductions"))


def test_a_norm_whose_sums_ride_is_a_part_and_its_product_another(world):
    cells, _ = world(2).run(jobs.benched, jobs.MAMBA2, ["--shapes", "1x9", "--recipes", "auto", "--parts"])[0]
    assert {"gated norm", "out_proj", "reductions"} < cells[0].parts.keys()


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_the_whole_tool(tmp_path):
    (tmp_path / "tiny").mkdir()
    config = tmp_path / "tiny" / "config.json"
    config.write_text(json.dumps(jobs.ZAMBA2))
    command = ["prefill", "--models", config, "--shapes", "2x5", "--layers", "2", "--json", tmp_path / "x.json"]
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr
    assert re.match(r"\d{4}-\d\d-\d\d, ranks 1, backend gloo, device CPU ", done.stdout)
    report = json.loads((tmp_path / "x.json").read_text())
    [cell] = report["cells"]
    assert (cell["model"], cell["batch"], cell["length"]) == ("tiny", 2, 5) and cell["ratio"] is None
    assert "## tiny, bfloat16\n\n- 2 of 4 layers" in done.stdout and "a pass is scaled" in done.stdout
    assert "- mamba-ssm is not measured: has no such layers" in done.stdout
    assert f"| 2x5 | megatron_ssm_tp | {cell['tokens_per_second']:.0f} | {cell['ms']:.2f} |" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8"], "--shapes='8': is no batch of prompts"),
        (["--shapes", "0x8"], "--shapes='0x8': is no batch"),
        (["--models", "mamba-9b"], "--models='mamba-9b': is no shape that is known"),
        (["--layers", "65"], "--layers=65: is no part of this model's layers; legal: 1 to 64"),
        (["--models", "zamba2-7b", "--layers", "6"], "--layers=6: is no part of this model's layers; legal: 7 to 81"),
        (["--dtype", "int8"], "--dtype='int8': cannot be run; legal: float32, bfloat16, float16"),
        (["--recipes", "int8"], "--recipes='int8': one rank reduces nothing"),
        (["--recipes", "int9"], "--recipes='int9': unknown format"),
        (["--json", "/nowhere/x"], "--json='/nowhere/x': cannot be written"),
        (["--json", "x" * 300], "cannot be written (File name too long)"),
        (["--json", f"{TOOL}/x"], "bench_inference.py/x': cannot be written (Not a directory)"),
        (["--json", "/proc/x"], "--json='/proc/x': cannot be written"),
        (["--plot", "x.xyz"], "--plot='x.xyz': is of no format that can be drawn; legal: .eps"),
        (["--shapes", "²x8"], "--shapes='²x8': is no batch"),
        (["--seconds", "0"], "--seconds=0.0: is no time to measure in"),
        (["--passes", "x_proj", "--models", "mamba2-2.7b"], "--passes='x_proj': mamba2-2.7b has no x_proj"),
        (["--passes", "engine", "--parts"], "--passes='engine': may be a CUDA graph, whose parts are not told apart"),
        (["--passes", "engine", "--models", "zamba2-7b"], "--models='zamba2-7b': has other layers than SSMs"),
    ],
)
def test_mistakes_in_options(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        bench.check(bench.read_args(["prefill", *arguments]), 1)


def test_a_report_that_may_not_be_replaced():
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        report = Path(folder, "x.json")
        report.write_text("earlier")
        report.chmod(0o444)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # what is read-only is so to root only by its own will
        try:
            with pytest.raises(UserError, match=r"--json='.*x.json': cannot be written \(Permission denied\)"):
                bench.check(bench.read_args(["prefill", "--json", str(report)]), 1)
        finally:
            os.seteuid(user)
        assert report.read_text() == "earlier"


def test_what_a_config_may_be(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder / "same").mkdir(parents=True)
        (tmp_path / folder / "same" / "config.json").write_text(json.dumps(jobs.FALCON))
    paths = [str(tmp_path / folder / "same" / "config.json") for folder in ("a", "b")]
    asked = bench.check(bench.read_args(["decode", "--models", paths[0], "mamba-2.8b", paths[1]]), 1)
    assert list(asked.models) == [paths[0], "mamba-2.8b", paths[1]]
    assert list(bench.check(bench.read_args(["decode", "--models", paths[0]]), 1).models) == ["same"]
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"--models='.*config.json': holds no config"):
        bench.check(bench.read_args(["decode", "--models", str(tmp_path / "config.json")]), 1)


def test_ranks_that_cannot_share_a_model_leave_an_earlier_report_alone(tmp_path):
    report = tmp_path / "x.json"
    report.write_text("earlier")
    with pytest.raises(UserError, match="--nproc-per-node=5"):
        bench.check(bench.read_args(["prefill", "--json", str(report)]), 5)
    done = run_tool("prefill", "--layers", "1", "--shapes", "1x1", "--dtype", "x", "--json", report)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: --dtype='x': cannot be run; legal: float32, bfloat16, float16\n"
    assert report.read_text() == "earlier" and list(tmp_path.iterdir()) == [report]


def test_the_models_are_those_of_the_checkpoints():
    """Sizes as the models' names say them, in billions of parameters."""
    from megatron_ssm_tp.partition.layout import model_parameters

    for name, billions in (("mamba-2.8b", 2.77), ("falcon-mamba-7b", 7.27), ("mamba2-2.7b", 2.70), ("zamba2-7b", 7.36)):
        config, layers = bench_shapes.read_model(bench_shapes.MODELS[name])
        shapes = [torch.Size(p.shape) for p in model_parameters(config).values()]
        assert layers == len(config.layers) and sum(s.numel() for s in shapes) / 1e9 == pytest.approx(
            billions, abs=0.01
        )


def test_the_rival_has_the_same_sizes(monkeypatch):
    """A stand-in for mamba-ssm is asked for what ours is."""

    class Model:
        def __init__(self, config, device, dtype):
            self.config, self.backbone = config, SimpleNamespace(layers=["a layer"])

        def eval(self):
            return self

        def __call__(self, tokens, num_last_tokens):
            return SimpleNamespace(logits=torch.zeros(len(tokens), num_last_tokens, self.config.vocab_size))

    models = ModuleType("mamba_ssm.models")
    found = {"config_mamba": {"MambaConfig": SimpleNamespace}, "mixer_seq_simple": {"MambaLMHeadModel": Model}}
    for name in ("mamba_ssm", "mamba_ssm.models"):
        monkeypatch.setitem(sys.modules, name, models)
    for name, content in found.items():
        monkeypatch.setitem(sys.modules, f"mamba_ssm.models.{name}", SimpleNamespace(**content))
    rivals = {}
    for name in ("mamba-2.8b", "falcon-mamba-7b", "mamba2-2.7b"):
        config, _ = bench_shapes.read_model(bench_shapes.MODELS[name], 3)
        rivals[name] = bench_models.MambaSsm(config, jobs.CPU, torch.float32)
        assert bench_models.no_rival(config, 1) == ""
        assert rivals[name].prefill(2, 4).run().shape == (2, config.vocab_size)
    with rivals["mamba-2.8b"].without_layers():
        assert len(rivals["mamba-2.8b"].model.backbone.layers) == 0
    falcon = rivals["falcon-mamba-7b"].model.config
    assert falcon.ssm_cfg == {"layer": "Mamba1", "d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 256}
    assert (falcon.d_model, falcon.n_layer, falcon.vocab_size) == (4096, 3, 65024) and not falcon.tie_embeddings
    expected = {"layer": "Mamba2", "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1}
    assert rivals["mamba2-2.7b"].model.config.ssm_cfg == expected


def test_kernels_belong_to_the_range_that_launched_them():
    def event(cat: str, name: str, ts: float, dur: float = 1, correlation: int | None = None) -> dict:
        args = {} if correlation is None else {"correlation": correlation}
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}

    def launched(at: float, number: int, kernel: str, dur: float, api: str = "cuda_runtime") -> list[dict]:
        return [event(api, "launch", at, 1, number), event("kernel", kernel, at + 1000, dur, number)]

    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", "part: norms + residual", 10, 90),
        event("user_annotation", "part: other", 20, 60),
        event("user_annotation", "part: in_proj", 30, 10),
        event("user_annotation", "something else", 30, 5),
        event("user_annotation", "part: out_proj", 41, 10),
        *launched(15, 1, "norm", 3),
        *launched(32, 2, "gemm", 40, "cuda_driver"),
        *launched(40.5, 3, "copy", 5),
        *launched(45, 4, "gemm", 20),
        *launched(48, 5, "ncclDevKernel_AllReduce", 7),
        *launched(90, 6, "add", 2),
        *launched(101, 7, "head", 11),
        event("gpu_memset", "Memset", 2000, 13, 99),
        event("cuda_runtime", "cudaEventRecord", 33),
    ]
    assert by_part(events, on_gpu=True) == {
        "norms + residual": 5,
        "in_proj": 40,
        "other": 5,
        "out_proj": 20,
        "reductions": 7,
        OUTSIDE: 24,
    }
    assert by_part(events, on_gpu=False) == {"norms + residual": 30, "other": 40, "in_proj": 10, "out_proj": 10}


def test_a_pass_that_fails_is_a_note():
    cells = [
        inference_report.Cell("a", "megatron_ssm_tp", 1, 8, note="OutOfMemoryError"),
        inference_report.Cell("a", "mamba-ssm", 1, 8, 5.0),
    ]
    assert "| 1x8 | megatron_ssm_tp | - | - |" in inference_report.table(inference_report.with_ratios(cells))


def test_the_plot(tmp_path):
    cells = [inference_report.Cell(m, w, b, 8, 1.0 + b) for m in "ab" for w in "cd" for b in (1, 2)]
    inference_report.plot(
        [*cells, inference_report.Cell("a", "e", 1, 8, note="not here")], str(tmp_path / "x.png"), "title"
    )
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_steps_of_decoding(world):
    """Of one rank and of two: a cell a batch and a reduction, and what could not be measured."""
    arguments = ["--batches", "1", "3", "--dtype", "float32", "--ssm-dtypes", "float32", "bfloat16"]
    for ranks, recipes in ((1, ["auto"]), (2, ["auto", "int8"])):
        cells = world(ranks).run(jobs.steps, jobs.FALCON, [*arguments, "--recipes", *recipes])[0]
        assert [cell.batch for cell in cells] == [1, 3] * (2 * len(recipes))
        assert all(cell.seconds > cell.floor > 0 and not cell.note for cell in cells)
        assert {(cell.host, cell.idle) for cell in cells} == {(None, None)}  # a CPU is the host
        words = [cell.way.split(", ")[1:] for cell in cells[::2]]
        shown = [
            [f"{dtype} states", *more] for more in ([], ["int8"])[: len(recipes)] for dtype in ("float32", "bfloat16")
        ]
        assert words == shown


def test_decode_as_a_command(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(jobs.FALCON))
    done = run_tool("decode", "--models", config, "--batches", "2", "--layers", "1", "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    [cell] = json.loads((tmp_path / "x.json").read_text())["cells"]
    assert cell["batch"] == 2 and f"| 2 | {cell['seconds'] * 1e3:.3f} |" in done.stdout


def test_steps_of_megatrons_engine(world):
    arguments = ["--batches", "1", "3", "--dtype", "float32", "--megatron"]
    cells = world(2).run(jobs.steps, jobs.FALCON, arguments)[0]
    assert [(cell.way.split(",")[0], cell.batch) for cell in cells] == [
        ("megatron_ssm_tp", 1),
        ("megatron_ssm_tp", 3),
        ("Megatron's engine", 1),
        ("Megatron's engine", 3),
    ]
    assert all(cell.seconds > 0 and not cell.note for cell in cells)


def test_a_table_of_steps_has_ratios_to_the_rivals():
    cells = [
        decode_bench.DecodeCell("m", "ours", 1, 0.004, 0.003, 0.001, 0.0002),
        decode_bench.DecodeCell("m", "mamba-ssm", 1, 0.006),
        decode_bench.DecodeCell("m", "ours", 8, note="no room"),
    ]
    assert "| m | ours | 1 | 4.000 | 250 | 75 | 25.0 | 5.00 | 1.50 |" in decode_bench.decode_table(cells)
    assert "| 8 |" not in decode_bench.decode_table(cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "0"], "--batches=0: is no number of requests; legal: an integer from 1"),
        (["--ssm-dtypes", "float8"], "--ssm-dtypes='float8': cannot be run; legal: "),
        (["--models", "zamba2-7b"], "--models='zamba2-7b': has other layers than SSMs"),
        (["--recipes", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=str,
)
def test_mistakes_about_steps(arguments, message):
    with pytest.raises(UserError) as error:
        bench.check(bench.read_args(["decode", *arguments]), 1)
    assert message in str(error.value)
