"""Small random models under our own engine on GPUs: its tokens against Megatron's engine's and Hugging Face's.

    python tools/check_engine.py                                             # Markdown; fails if a token differs
    torchrun --standalone --nproc-per-node 2 tools/check_engine.py

float32, greedy: requests that all come at once and such that come and go, other bursts, without graphs, with kept
prefixes, conversations taken up from states. Sampled: alone and in company.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from megatron_ssm_tp import LLM, Bursts, CacheLimits, SamplingParams, quiet_imports
from megatron_ssm_tp.cli.console import RUN_ERROR, Parser, guarded, quieted, say
from megatron_ssm_tp.inference.distributed import join

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
with quiet_imports():
    from measure import conditions, in_words
    from models import TinyModel, make_tiny

WIDE = {"vocab_size": 1001, "hidden_size": 256, "num_hidden_layers": 4, "state_size": 16}
MODELS = {
    "mamba": WIDE | {"intermediate_size": 512},
    "falcon_mamba": WIDE | {"intermediate_size": 512},
    "mamba2": WIDE | {"num_heads": 8, "head_dim": 64, "n_groups": 2},
}
LIMITS = {"max_requests": 5, "max_tokens": 128, "max_sequence_length": 4096}
LENGTHS, COUNTS = (1, 300, 40, 7, 150, 2, 64, 33, 9, 1500), (40, 12, 1, 30, 25, 64, 8, 17, 50, 20)
WAYS: dict[str, Bursts] = {
    "graphs": Bursts(),
    "graphs, bursts of 7, 3 ahead": Bursts(longest=7, while_reading=3, ahead=3),
    "a look at every token": Bursts(longest=1, while_reading=1, ahead=0),
    "no graphs": Bursts(graphs=False),
}
Answers = list[list[int]]


def ways() -> dict[str, Bursts]:
    """WAYS, as far as there are: a CPU has no graphs."""
    if torch.cuda.is_available():
        return WAYS
    return {way.replace("graphs", "bursts"): bursts for way, bursts in WAYS.items() if bursts.graphs}


def prompts() -> Answers:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 1001, (length,), generator=generator).tolist() for length in LENGTHS]


def params_of(count: int, end: int = -1, **more: float) -> SamplingParams:
    params = SamplingParams(
        temperature=more.pop("temperature", 0), num_tokens_to_generate=count, termination_id=end, top_k=0
    )
    params.add_attributes(more)
    return params


def hugging_face(model: TinyModel) -> Answers:
    """Greedy answers of transformers' own implementation on this GPU."""
    hf, found = model.hf.to("cuda" if torch.cuda.is_available() else "cpu"), []
    for prompt, count in zip(prompts(), COUNTS, strict=True):
        ids = torch.tensor([prompt], device=hf.device)
        out = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


@contextmanager
def loaded(path: Path, engine: str, bursts: Bursts | None = None, **limits: int) -> Iterator[LLM]:
    limits = CacheLimits(**LIMITS | limits)
    with LLM.from_pretrained(path, dtype="float32", limits=limits, engine=engine, bursts=bursts) as llm:
        yield llm


def all_at_once(llm: LLM, ends: list[int] | None = None) -> Answers:
    each = [params_of(count, end) for count, end in zip(COUNTS, ends or [-1] * len(COUNTS), strict=True)]
    return [output.token_ids for output in llm.generate(prompts(), each)]


def coming_and_going(llm: LLM, seed: int) -> Answers:
    """Requests that come between steps, some of them twice, whose first is cancelled on the way."""
    draw, left, found, doomed = random.Random(seed), list(range(len(COUNTS))), {}, set()
    requests = llm._reader.read(prompts(), [params_of(count) for count in COUNTS])
    with llm.engine.alone():
        while left or doomed or llm.engine.has_unfinished:
            if left and draw.random() < 0.5:
                index = left.pop(0)
                llm.engine.add(index, requests[index])
                if draw.random() < 0.5:
                    doomed.add(index + 100)
                    llm.engine.add(index + 100, requests[index])
            if doomed and draw.random() < 0.3:
                llm.engine.cancel(doomed.pop())
            found |= {progress.index: progress.token_ids for progress in llm.engine.step() if progress.finished}
    assert sorted(llm.engine.free_slots) == list(range(LIMITS["max_requests"]))
    return [found[index] for index in range(len(COUNTS))]


def taken_up(llm: LLM) -> Answers:
    """Each answer in two halves, the second from the state after the first."""
    halves = [max(1, count // 2) for count in COUNTS]
    first = llm.generate(prompts(), [params_of(half) for half in halves], return_states=True)
    rest = [(i, count - half) for i, (count, half) in enumerate(zip(COUNTS, halves, strict=True)) if count > half]
    states = [first[i].state for i, _ in rest]
    then = llm.generate([[] for _ in rest], [params_of(count) for _, count in rest], states=states)
    answers = [output.token_ids for output in first]
    for (i, _), output in zip(rest, then, strict=True):
        answers[i] = answers[i] + output.token_ids
    return answers


def sampled(llm: LLM) -> tuple[Answers, Answers]:
    """Answers of requests with seeds of their own: each alone, and all together."""
    each = [params_of(20, temperature=1.0, seed=seed, min_p=0.01) for seed in range(len(LENGTHS))]
    alone = [llm.generate([prompt], one)[0].token_ids for prompt, one in zip(prompts(), each, strict=True)]
    return alone, [output.token_ids for output in llm.generate(prompts(), each)]


def compare(name: str, model: TinyModel) -> bool:
    """Print the rows of a model; whether all are alike."""
    expected, good = hugging_face(model), True

    def row(way: str, run: Callable[[], Answers], wanted: Answers = expected) -> None:
        nonlocal good
        found = run()
        equal = sum(one == other for one, other in zip(found, wanted, strict=True))
        good &= equal == len(wanted)
        say(f"| {name} | {way} | {equal} of {len(wanted)} |")

    with loaded(model.path, "megatron") as llm:
        row("Megatron's engine", lambda: all_at_once(llm))
    for way, bursts in ways().items():
        with loaded(model.path, "slots", bursts) as llm:
            row(way, lambda: all_at_once(llm))
            row(f"{way}, coming and going", lambda: coming_and_going(llm, 5))
    with loaded(model.path, "slots", max_tokens=4096) as llm:
        row("whole prompts in a pass", lambda: all_at_once(llm))
    with loaded(model.path, "slots", prefix_bytes=1 << 28) as llm:
        for way in ("prefixes are seen", "prefixes are kept", "prefixes are found"):
            row(way, lambda: all_at_once(llm))
        row("prefixes are found, coming and going", lambda: coming_and_going(llm, 6))
        say(f"| {name} | prompts that began with a kept prefix | {llm.prefix_counts().hits} |")
        good &= llm.prefix_counts().hits > 0
        row("in two halves, from states", lambda: taken_up(llm))
        ends = [answer[len(answer) // 2] for answer in expected]
        cut = [answer[: answer.index(end) + 1] for answer, end in zip(expected, ends, strict=True)]
        row("ended by a token", lambda: all_at_once(llm, ends), cut)
        alone, together = sampled(llm)
        row("sampled alone, against in company", lambda: alone, together)
    return good


def main() -> None:
    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    quieted()
    device, groups = join(None)
    paths: list[str | None] = [tempfile.mkdtemp() if groups.tp.rank() == 0 else None]
    dist.broadcast_object_list(paths, 0)
    folder = Path(paths[0])
    say(f"{in_words(conditions(device))}\n\n| model | way | answers of the same tokens |\n|---|---|---|")
    good = True
    for name, sizes in MODELS.items():
        # The same weights on all ranks; Hugging Face writes rank 0's alone.
        model = make_tiny(folder / f"{name}-{groups.tp.rank()}", name, tied=False, **sizes)
        dist.barrier()
        good &= compare(name, replace(model, path=folder / f"{name}-0"))
    say("\nAll are the same." if good else "\nTokens differ.")
    dist.destroy_process_group()
    if not good:
        sys.exit(RUN_ERROR)


if __name__ == "__main__":
    sys.exit(guarded(main))
