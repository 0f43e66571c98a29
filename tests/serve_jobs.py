"""What ranks are asked about the benchmark tool's load, soak and prefixes."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import bench_inference_jobs as jobs
import serve_bench
import serve_load
import serve_loop
import torch.distributed as dist

from megatron_ssm_tp import UserError
from megatron_ssm_tp.inference import prompts, requests
from megatron_ssm_tp.inference.distributed import tensor_parallel_groups
from megatron_ssm_tp.inference.engine import SlotEngine
from megatron_ssm_tp.inference.prefix_cache import PrefixCache, Snapshot


def ran(command: str, arguments: list[str], report: Path) -> tuple[dict, str | None]:
    """The report of a subcommand on a tiny Falcon-Mamba, and what does not hold."""
    groups = tensor_parallel_groups(None)
    report = report if groups.tp.rank() == 0 else report.with_name("of another rank")  # all ranks speak in tests
    with mock.patch.dict(jobs.bench_shapes.MODELS, {"tiny": jobs.FALCON}):
        args = jobs.bench.read_args(
            [command, "--models", "tiny", "--dtype", "float32", "--json", str(report), *arguments]
        )
        asked = jobs.bench.check(args, groups.tp.size())
        failure = jobs.bench.COMMANDS[command][0].run(jobs.bench.Setting(args, asked, groups, jobs.CPU, {}))
    return json.loads(report.read_text()), failure


def soaked(arguments: list[str], report: Path, defect: str) -> tuple[dict, str | None]:
    """A soak of an engine that keeps a slot, forgets a request's answer, lets one wait or takes and refuses the wrong
    ones, or of a host that loses memory."""
    end, run, add = SlotEngine._end, serve_loop.Serving.run, SlotEngine.add

    def keeping(engine, running):
        end(engine, running)
        if running.index == 3 and engine.free_slots:
            engine.free_slots.pop()

    def forgetting(serving, *given):
        served = run(serving, *given)
        served.answers.pop()
        return served

    def starving(engine, index, request):
        add(engine, index, request)
        if index == 3:
            engine._waiting.pop()

    def taking(field, value, *_):
        return float(value)

    def refusing(params, prompt_length, limits, own_engine):
        raise UserError("temperature", 0, "is refused", "nothing")

    def confusing(engine, running):
        return replace(after(engine, running), token_ids=[1])

    after = SlotEngine._state_after
    defects = {
        "states": mock.patch.object(SlotEngine, "_state_after", confusing),
        "no request came": mock.patch.object(serve_load.Load, "arrivals", lambda *_: iter(())),
        "stalled": mock.patch.object(SlotEngine, "add", starving),
        "taken": mock.patch.object(requests, "_number", taking),
        "turned away": mock.patch.object(prompts, "read_params", refusing),
        "slots": mock.patch.object(SlotEngine, "_end", keeping),
        "unanswered": mock.patch.object(serve_loop.Serving, "run", forgetting),
        "host memory": mock.patch.object(serve_bench, "HOST_GROWTH", -(1 << 40)),
    }
    with defects[defect], mock.patch.object(serve_load, "WRONG", 0.4):
        return ran("serve", arguments, report)


def counted(arguments: list[str], report: Path) -> tuple[int, int, int, list[str]]:
    """Broadcasts, steps and naps of a load, and what is said."""
    said: list[str] = []
    with (
        mock.patch.object(dist, "broadcast", side_effect=dist.broadcast) as broadcasts,
        mock.patch.object(SlotEngine, "step", autospec=True, side_effect=SlotEngine.step) as steps,
        mock.patch.object(serve_loop, "sleep", side_effect=serve_loop.sleep) as naps,
        mock.patch.object(serve_bench, "say", said.append),
        mock.patch.object(serve_loop.dist, "new_group", side_effect=dist.new_group) as groups,
    ):
        ran("serve", arguments, report)
    assert groups.call_count == (1 if dist.get_world_size() > 1 else 0)
    return broadcasts.call_count, steps.call_count, naps.call_count, said


def forgetful(arguments: list[str], report: Path) -> tuple[dict, str | None]:
    """Of prefixes that are never found."""
    with mock.patch.object(PrefixCache, "find", lambda cache, *_: (0, None)):
        return ran("prefix", arguments, report)


def corrupted(arguments: list[str], report: Path) -> tuple[dict, str | None]:
    """Of prefixes whose kept states are others."""
    keep = PrefixCache.keep

    def keeping(cache, prefix, snapshot, made_by):
        keep(cache, prefix, Snapshot(snapshot.conv + 9, snapshot.ssm - 9), made_by)

    with mock.patch.object(PrefixCache, "keep", keeping):
        return ran("prefix", arguments, report)
