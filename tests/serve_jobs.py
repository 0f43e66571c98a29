"""What ranks are asked about the benchmark tool's load, soak and prefixes."""

import json
from pathlib import Path
from unittest import mock

import bench_inference_jobs as jobs
import serve_bench
import serve_loop

from megatron_ssm_tp import UserError
from megatron_ssm_tp.inference.distributed import tensor_parallel_groups
from megatron_ssm_tp.inference.engine import SlotEngine


def ran(command: str, arguments: list[str], report: Path) -> tuple[dict, str]:
    """The report of a subcommand on a tiny Falcon-Mamba, and its error."""
    groups, error = tensor_parallel_groups(None), ""
    report = report if groups.tp.rank() == 0 else report.with_name("of another rank")  # all ranks speak in tests
    with mock.patch.dict(jobs.bench_models.MODELS, {"tiny": jobs.FALCON}):
        args = jobs.bench.read_args(
            [command, "--models", "tiny", "--dtype", "float32", "--json", str(report), *arguments]
        )
        asked = jobs.bench.check(args, groups.tp.size())
        try:
            jobs.bench.COMMANDS[command][0].run(jobs.bench.Setting(args, asked, groups, jobs.CPU, {}))
        except UserError as mistake:
            error = str(mistake)
    return json.loads(report.read_text()), error


def soaked(arguments: list[str], report: Path, defect: str) -> tuple[dict, str]:
    """A soak of an engine that keeps a slot, or forgets a request's answer, or of a host that loses memory."""
    end, run = SlotEngine._end, serve_loop.Serving.run

    def keeping(engine, running):
        end(engine, running)
        if running.index == 3 and engine.free_slots:
            engine.free_slots.pop()

    def forgetting(serving, arrivals, seconds):
        served = run(serving, arrivals, seconds)
        served.answers.pop()
        return served

    defects = {
        "slots": mock.patch.object(SlotEngine, "_end", keeping),
        "unanswered": mock.patch.object(serve_loop.Serving, "run", forgetting),
        "host memory": mock.patch.object(serve_bench, "HOST_GROWTH", -(1 << 40)),
    }
    with defects[defect]:
        return ran("serve", arguments, report)
