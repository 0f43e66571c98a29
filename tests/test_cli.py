"""The command line as its users meet it: whole processes, one a rank."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_ssm_tp import UserError
from megatron_ssm_tp.cli import console, generate

CHECKPOINTS = Path(__file__).parent.parent / "examples" / "checkpoints"
MAMBA, FALCON = CHECKPOINTS / "mamba-kjv-2.7m", CHECKPOINTS / "falcon-mamba-kjv-2.7m"
COMMAND = [sys.executable, "-m", "megatron_ssm_tp"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(size: int, *args: object, cwd: list[Path] | None = None) -> list[subprocess.Popen]:
    """The command on `size` ranks, with torchrun's environment but no torchrun: nobody ends a rank but itself."""
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [*COMMAND, *map(str, args)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd[rank] if cwd else None,
        )
        for rank in range(size)
    ]


def run(*args: object) -> subprocess.CompletedProcess:
    """One plain process, no torchrun."""
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60, check=False)


def test_torchrun_generates_what_one_process_generates(tmp_path):
    prompts = ["And God said", "Blessed are the"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    options = ["--dtype", "float32", "--max-new-tokens", "40", "--json"]
    args = ["--load", FALCON, "--tensor-model-parallel-size", "2", "--prompt-file", tmp_path / "prompts.txt", *options]
    two = subprocess.run(
        [*torchrun, "-m", "megatron_ssm_tp", "generate", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    one = run("generate", "--load", FALCON, "--prompt", prompts[0], "--prompt", prompts[1], *options)
    two_report, one_report = json.loads(two.stdout), json.loads(one.stdout)  # one object: only rank 0 speaks
    assert two_report["tensor_model_parallel_size"] == 2 and one_report["tensor_model_parallel_size"] == 1
    assert [out["text"] for out in two_report["outputs"]] == [out["text"] for out in one_report["outputs"]]
    assert two_report["tokens_per_second"] > 0 and two_report["time_to_first_token"] > 0
    assert "\n" not in one.stderr.strip(), "a run that goes well says nothing on stderr"


def test_text_comes_in_the_order_of_the_prompts():
    prompts = ["--prompt", "And God said", "--prompt", "Noah"]
    answer = run("generate", "--load", MAMBA, *prompts, "--max-new-tokens", 30, "--tp-allreduce-recipe", "int8")
    first, second, speed = answer.stdout.split("\n\n")
    assert first.startswith("And God said") and second.startswith("Noah")
    assert "60 tokens in" in speed and "tokens/s; time to first token" in speed
    assert answer.returncode == 0
    assert "note: one rank: nothing is reduced, and recipes change nothing\n" in answer.stderr


def test_sampling_options_and_seed():
    options = ["--prompt", "And", "--temperature", 0.8, "--top-p", 0.9, "--max-new-tokens", 20, "--json"]
    texts = [
        json.loads(run("generate", "--load", MAMBA, "--seed", seed, *options).stdout)["outputs"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_engines_and_what_one_of_them_keeps():
    options = ["--load", MAMBA, "--prompt", "And God said", "--max-new-tokens", 40, "--dtype", "float32", "--json"]
    wanted = [[], ["--engine", "megatron"], ["--prefix-bytes", 1 << 20], ["--repetition-penalty", 100]]
    found = [json.loads(run("generate", *options, *more).stdout) for more in wanted]
    assert [report["engine"] for report in found] == ["slots", "megatron", "slots", "slots"]
    texts = [report["outputs"][0]["text"] for report in found]
    assert texts[0] == texts[1] == texts[2] != texts[3]


def without_tokenizer(path: Path) -> Path:
    (path / "tokenizer.json").unlink()
    return path


def truncated(path: Path) -> Path:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:100_000])
    return path


def of_another_type(path: Path) -> Path:
    config = json.loads((path / "config.json").read_text()) | {"model_type": "rwkv"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def misshapen(path: Path) -> Path:
    config = json.loads((path / "config.json").read_text()) | {"state_size": 8}
    (path / "config.json").write_text(json.dumps(config))
    return path


def edited(path: Path, change) -> Path:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    return path


def incomplete(path: Path) -> Path:
    return edited(path, lambda tensors: tensors.pop("backbone.layers.2.mixer.D"))


def crowded(path: Path) -> Path:
    name = "backbone.layers.{}.mixer.D"
    return edited(path, lambda tensors: tensors.update({name.format(6): tensors[name.format(0)].clone()}))


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (None, ["--tensor-model-parallel-size", 4], "--tensor-model-parallel-size=4: is not the world size; legal: 2"),
        (
            of_another_type,
            [],
            "model_type='rwkv': is not a supported family; legal: mamba, falcon_mamba, mamba2, zamba",
        ),
        (truncated, [], "model.safetensors': cannot be read"),
        (misshapen, [], "has shape [47, 480]; legal: [31, 480], from config.json"),
        (without_tokenizer, [], "has no tokenizer.json, so text cannot be read"),
        (None, ["--prompt", ""], "prompts[1]='': is empty; legal: at least one token"),
        (None, ["--max-sequence-length", 8, "--prompt", "In the beginning was the Word, and"], "is longer than the"),
        (incomplete, [], "tensor='backbone.layers.2.mixer.D': is missing from the checkpoint; legal: shape [480]"),
        (crowded, [], "tensor='backbone.layers.6.mixer.D': is not part of this mamba model"),
        (None, ["--json", "."], "--json='.': cannot be written"),
        (None, ["--json", "/nowhere/report.json"], "--json='/nowhere/report.json': cannot be written"),
        (None, ["--prompt-file", "/nowhere.txt"], "--prompt-file='/nowhere.txt': cannot be read"),
        (None, ["--dtype", "int4"], "--dtype='int4': cannot be run; legal: auto, float32, bfloat16, float16"),
        (None, ["--seed", 2**70], "--seed=1180591620717411303424: is out of range"),
        (None, ["--ops", "cuda"], "--ops='cuda': is no implementation; legal: auto, triton, reference"),
        (None, ["--tp-overlap-from", 0], "--tp-overlap-from=0: is no number of tokens; legal: an integer from 1"),
        (None, ["--tp-overlap", "x_proj"], "--tp-overlap='x_proj': is of no pass; legal: beside tp_overlap_from"),
        (
            None,
            ["--tp-overlap", "thirds", "--tp-overlap-from", 9],
            "--tp-overlap='thirds': hides no reduction; legal: halves, x_proj",
        ),
        (None, ["--engine", "v8"], "--engine='v8': is no engine; legal: auto, slots, megatron"),
        (None, ["--min-p", 2], "--min-p=2.0: is out of range; legal: 0 (off) to 1"),
        (None, ["--tempature", 1], "unrecognized arguments: --tempature 1"),
    ],
    ids=[
        "world",
        "family",
        "truncated",
        "shape",
        "tokenizer",
        "empty",
        "long",
        "missing",
        "extra",
        "json folder",
        "json",
        "prompt file",
        "dtype",
        "seed",
        "ops",
        "overlap",
        "overlap of nothing",
        "way to overlap",
        "engine",
        "min p",
        "argument",
    ],
)
def test_bad_input_ends_every_rank_with_one_line(tmp_path, damage, options, message):
    path = MAMBA
    if damage:
        path = damage(Path(shutil.copytree(MAMBA, tmp_path / "checkpoint")))
    line = error_of_ranks(2, "generate", "--load", path, "--prompt", "And", "--max-new-tokens", 4, *options)
    assert message in line


def test_a_prompt_file_that_one_rank_cannot_see(tmp_path):
    (tmp_path / "prompts.txt").write_text("And\n")
    ranks = start_ranks(2, "generate", "--load", MAMBA, "--prompt-file", "prompts.txt", cwd=[tmp_path, Path("/")])
    results = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert results[0][1].startswith("error: --prompt-file='prompts.txt': cannot be read") and not results[1][1]


def test_a_tp_size_that_does_not_divide_d_inner(tiny):
    line = error_of_ranks(3, "generate", "--load", tiny("mamba").path, "--prompt", "And")
    assert "--tensor-model-parallel-size=3: does not divide d_inner (88); legal: 1, 2, 4, 8, 11, 22, 44" in line


def error_of_ranks(size: int, *args: object) -> str:
    """The one line that the command ends with; every rank has exited with status 2 and printed nothing else."""
    ranks = start_ranks(size, *args)
    results = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [2] * size
    lines = [line for _, stderr in results for line in stderr.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert results[0][1], "rank 0 is the one that speaks"
    assert all(stdout == "" for stdout, _ in results)
    return lines[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others(victim):
    """Within 30 seconds, with one line and a status that is not zero; no torchrun is there to do it."""
    options = ["--max-new-tokens", 30_000, "--prompt", "And God said"]
    ranks = start_ranks(2, "generate", "--load", MAMBA, *options)
    assert ranks[0].stdout.read(30)  # it is generating
    ranks[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    survivor = ranks[1 - victim]
    _, stderr = survivor.communicate(timeout=30)
    ranks[victim].communicate()
    assert time.monotonic() - killed < 30 and survivor.returncode == 1
    [line] = stderr.splitlines()
    assert line.startswith(f"error: rank {1 - victim}: another rank ended or cannot be reached")


def test_a_reader_that_has_enough_ends_the_run_quietly():
    args = ["generate", "--load", MAMBA, "--prompt", "And God said", "--max-new-tokens", 30_000]
    [process] = start_ranks(1, *args)
    process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(30) == 1


def test_an_interrupt_ends_the_run_with_one_word():
    args = ["generate", "--load", MAMBA, "--prompt", "And God said", "--max-new-tokens", 30_000]
    [process] = start_ranks(1, *args)
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stdout.endswith("interrupted\n") and stderr == ""


def test_plan_says_what_goes_where():
    answer = run("plan", "--load", FALCON, "--tensor-model-parallel-size", 2)
    assert answer.returncode == 0
    assert "legal TP sizes (to 64): 1, 2, 3, 4, 5, 6, 8, 10, 12" in answer.stdout
    assert "backbone.layers.*.mixer.in_proj.weight  [960, 240]  cut by rows" in answer.stdout
    assert "rank 1  [480, 240]  x 240:480, z 720:960" in answer.stdout
    assert "rank 1  [766, 240]  766:1531, 1 of padding" in answer.stdout
    sent = (
        "SSM layer (x 5): 2 all-reduces, 574 bytes a token: 47 values (x_proj, 2 ranks), 240 values (out_proj, 2 ranks)"
    )
    assert sent in answer.stdout


def test_plan_counts_the_bytes_that_are_loaded():
    """At TP=1 the bytes are those of the file, but for A_log and D, which are float32."""
    tensors = load_file(FALCON / "model.safetensors")
    wide = sum(t.nbytes for name, t in tensors.items() if name.endswith(("A_log", "mixer.D")))
    expected = sum(t.nbytes for t in tensors.values()) + wide
    assert f"a rank of 1 holds {expected:,} bytes of weights" in run("plan", "--load", FALCON).stdout


def test_plan_refuses_an_illegal_size():
    answer = run("plan", "--load", MAMBA, "--tensor-model-parallel-size", 9)
    expected = "error: --tensor-model-parallel-size=9: does not divide d_inner (480); legal: 1, 2, 3,"
    assert answer.returncode == 2 and answer.stderr.startswith(expected)


def test_doctor_names_versions():
    import torch

    answer = run("doctor")
    assert answer.returncode == 0
    assert torch.__version__.split("+")[0] in answer.stdout and "megatron-core" in answer.stdout


def test_plan_explains_what_ranks_share(tmp_path):
    """Two heads of keys, groups and mamba heads on four ranks, and what each kind of layer sends."""
    from models import make_tiny

    def plan(family: str) -> str:
        path = make_tiny(tmp_path / family, family).path
        return run("plan", "--load", path, "--tensor-model-parallel-size", 4).stdout

    nemotron = plan("nemotron_h")
    assert "layers: 2 SSM, 1 attention, 1 MLP; attention of 8 heads of 7" in nemotron
    assert "2 of keys and values, each kept by 2 ranks" in nemotron
    assert "rank 3  [28, 40]  q 42:56, k 7:14 (shared), v 7:14 (shared)" in nemotron
    assert "attention layer (x 1): 1 all-reduce, 160 bytes a token: 40 values (attention out_proj, 4 ranks)" in nemotron
    assert "1 values (norm, 2 ranks)" in nemotron
    zamba = plan("zamba")
    assert "2 mamba heads, d_inner 88" in zamba and "3 calls of 1 shared blocks" in zamba
    assert "rank 1  [44, 44]  x 44:87:2, z 45:88:2" in zamba  # interleaved in the file
    assert "13 values (x_proj, 2 ranks)" in zamba and "shared block and SSM layer (x 3): 4 all-reduces" in zamba
    assert "bytes of keys and values for each of its tokens" in zamba


def test_generate_with_quantized_reductions(tmp_path):
    """By name and by file, on two ranks; the report is rank 0's."""
    common = ["--load", MAMBA, "--prompt", "And God said", "--max-new-tokens", 12, "--dtype", "float32", "--json"]
    file = tmp_path / "recipes.yaml"
    file.write_text("matchers:\n  all: {type: glob, pattern: '*', config: none, enabled: true}\n")
    tokens, in_force = [], []
    for more in ([], ["--tp-allreduce-recipe", "int8"], ["--tp-allreduce-cfg", file]):
        first, _ = [process.communicate(timeout=100)[0] for process in start_ranks(2, "generate", *common, *more)]
        report = json.loads(first)
        tokens.append(report["outputs"][0]["token_ids"])
        in_force.append(report["tp_allreduce"])
        assert report["ops"] == {"name": "reference", "reason": "no CUDA device"} and report["engine"] == "slots"
    assert tokens[2] == tokens[0] and len(tokens[1]) == 12
    none, mixed = {"none": 12}, {"none": 6, "int8": 6}
    off = {"recipe": None, "cfg": None, "min_bytes": None, "sites": none, "sites_of_steps": none}
    int8 = off | {"recipe": "int8", "sites": mixed, "sites_of_steps": mixed}
    assert in_force == [off, int8, off | {"cfg": str(file)}]


@pytest.mark.parametrize("more", [["--top-k", "3"], ["--top-p", "0.5"], ["--min-p", "0.1"]])
def test_greedy_answers_are_not_chosen_among_others(more):
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    args = ["generate", "--load", ".", "--prompt", "David", *more]
    assert generate._read_inputs(parser.parse_args(args)) == ["David"]
    with pytest.raises(UserError, match=r"temperature=0.0: is greedy, which leaves --top-k, --top-p and --min-p"):
        generate._read_inputs(parser.parse_args([*args, "--temperature", "0"]))


NO_MATCHER = "matchers: {m: {type: glob, pattern: '*', config: int8}}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp-allreduce-recipe", "int7"], "--tp-allreduce-recipe='int7': unknown format; legal: none, bf16, int8"),
        (["--tp-allreduce-cfg", "/nowhere.yaml"], "--tp-allreduce-cfg='/nowhere.yaml': cannot be read"),
        (["--tp-allreduce-cfg", "off.yaml"], "--tp-allreduce-cfg='off.yaml': matchers=['m']: none of them is enabled"),
        (
            ["--tp-allreduce-recipe", "none", "--tp-allreduce-min-bytes", "9"],
            "--tp-allreduce-min-bytes=9: is of no rec",
        ),
        (
            ["--tp-allreduce-min-bytes", "9"],
            "--tp-allreduce-min-bytes=9: is of no recipe; legal: beside --tp-allreduce",
        ),
        (["--tp-allreduce-recipe", "int8", "--tp-allreduce-min-bytes=-1"], "--tp-allreduce-min-bytes=-1: no count of"),
        (
            ["--tp-allreduce-recipe", "int8", "--tp-allreduce-cfg", "x"],
            "--tp-allreduce-recipe='int8': stands beside --tp-allreduce-cfg; legal: one of the two",
        ),
    ],
)
def test_wrong_recipes_are_one_line(monkeypatch, capsys, tmp_path, options, message):
    """Without a process of its own: those take seconds to start."""
    (tmp_path / "off.yaml").write_text(NO_MATCHER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "leave", sys.exit)
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["generate", "--load", ".", *options])
    with pytest.raises(SystemExit) as end:
        console.guarded(lambda: generate._read_recipes(args))
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out and len(said.err.splitlines()) == 1
    assert said.err.startswith(f"error: {message}")


def test_a_recipe_file_for_another_model_is_one_line_from_rank_0(tmp_path):
    file = tmp_path / "recipes.yaml"
    file.write_text("matchers:\n  last: {type: glob, pattern: '*.layers.63.*', config: int8, enabled: true}\n")
    answers = [
        process.communicate(timeout=100)
        for process in start_ranks(2, "generate", "--load", MAMBA, "--prompt", "x", "--tp-allreduce-cfg", file)
    ]
    [line] = answers[0][1].splitlines()
    sites = "decoder.layers.0..5.mixer.x_proj, decoder.layers.0..5.mixer.out_proj"
    said = (
        "matchers.last.pattern='*.layers.63.*': fits no row-parallel linear of this model; legal: a glob for some of "
    )
    assert line.startswith(f"error: --tp-allreduce-cfg={str(file)!r}: {said}{sites};") and answers[1][1] == ""
