"""The Python API: a checkpoint directory becomes a model that writes, in one process or on all ranks of torchrun."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.inference.sampling_params import SamplingParams

from ..checkpoint.loader import ModelCheckpoint
from ..comm.recipe_book import RecipeBook
from ..comm.recipes import AllReduceRecipe
from ..compat.cpu import megatron_on_cpu
from ..errors import UserError
from ..layers.model import SSMModel
from ..layers.overlap import HALVES
from ..ranks import agree, check_all_same, lost_peers_reported
from .answers import Answer, TextPiece
from .conversation import ConversationState, load_state, save_state
from .distributed import join
from .engine import SlotEngine
from .engines import build_engine
from .loading import Asked
from .megatron_engine import MegatronEngine
from .peers import PeerWatch
from .prefix_cache import PrefixCounts
from .prompts import Params, Reader, States, in_few_letters, told
from .requests import GenerationOutput, Limits, Prompt, Request, check_seed, check_token_ids
from .running import Bursts
from .state import CacheLimits
from .tokenizer import NoTokenizer, TextTokenizer


class LLM:
    """A model ready to generate. Under torchrun every rank builds it and makes the same calls; each gets every result.

    Use `from_pretrained`, and `close` (or a with statement) where a model is not kept to the end. Between calls the
    process is as it was: Megatron's inference mode is off and, on a machine without CUDA, torch.cuda untouched.
    """

    def __init__(
        self,
        model: SSMModel,
        checkpoint: ModelCheckpoint,
        tokenizer: TextTokenizer | NoTokenizer,
        limits: CacheLimits,
        engine: str = "auto",
        bursts: Bursts | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.config, self.tokenizer = model, checkpoint.config, tokenizer
        self.limits = Limits(self.config.vocab_size, limits.max_sequence_length)
        tp_group = model.pg_collection.tp
        self.engine: SlotEngine | MegatronEngine | None = build_engine(
            engine, model, self.config, tokenizer, limits, bursts, seed
        )
        table = self.engine.table if isinstance(self.engine, SlotEngine) else None
        self._reader = Reader(tokenizer, self.limits, self.config.eos_token_ids, table)
        on_gpu = model.embedding.word_embeddings.weight.is_cuda
        self._watch = PeerWatch(tp_group) if on_gpu and tp_group.size() > 1 else None
        self._step = self._watch.step if self._watch else nullcontext

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tensor_model_parallel_size: int | None = None,
        dtype: str | torch.dtype = "auto",
        *,
        tokenizer: str | Path | None = None,
        limits: CacheLimits | None = None,
        seed: int = 0,
        exact_norm: bool = False,
        ops: str = "auto",
        tp_allreduce: AllReduceRecipe | RecipeBook | str | None = None,
        tp_overlap_from: int | None = None,
        tp_overlap: str = HALVES,
        engine: str = "auto",
        bursts: Bursts | None = None,
    ) -> "LLM":
        """Load a Hugging Face or state-spaces checkpoint, each rank its share.

        Args:
            path: directory with config.json and weights.
            tensor_model_parallel_size: None is the world size; anything else must equal it.
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16"; A_log and D are float32 always.
            tokenizer: a tokenizer.json, or a directory with one, if it is not in `path`.
            limits: how many requests and tokens run at once.
            seed: of the sampling generator, the same on every rank.
            tp_allreduce: how the ranks' partial sums travel: a recipe for all sites but x_proj's, or a book of recipes
                by site, none of whose enabled matchers may fit no site; "none" is Megatron's own all-reduce. None is
                that too, but for steps and graphs of our engine in bfloat16 (inference/small_sums.py).
            tp_overlap_from: passes over this many tokens or more hide reductions behind products; None: none does.
            tp_overlap: how: "halves" of the tokens by turns, where all layers are SSMs, or "x_proj"'s sums behind z's
                product, of Mamba-1 (layers/overlap.py).
            ops: who computes convolutions and scans, "auto", "triton" or "reference" (ops/choose.py), not norms.
            engine: "slots", ours for models of SSM layers alone, "megatron", or "auto", which is ours where it can be.
            bursts: how often our engine's host looks at what the device has generated; None is what suits the device.
            exact_norm: a Mamba-2 norm that spans ranks is finished before out_proj, by an all-reduce of its own.

        Raises:
            UserError: anything wrong with these or with the files; the same on every rank.
            PeerLostError: another rank ended. On GPUs the process then ends with status 1, here and in later calls:
                nothing can leave a NCCL kernel that waits.
        """
        device, groups = join(tensor_model_parallel_size)
        limits = limits if limits is not None else CacheLimits()
        asked = Asked(
            dtype=dtype,
            limits=limits,
            seed=seed,
            exact_norm=exact_norm,
            ops=ops,
            tp_allreduce=tp_allreduce,
            tp_overlap_from=tp_overlap_from,
            tp_overlap=tp_overlap,
            engine=engine,
            bursts=bursts,
        )
        with lost_peers_reported(), megatron_on_cpu():
            files = asked.files(path, tokenizer, groups)
            model = asked.model(files, groups, device)
            return cls(model, files.checkpoint, files.tokenizer, limits, engine, bursts, seed)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: Params = None,
        *,
        seed: int | None = None,
        states: States = None,
        return_states: bool = False,
    ) -> list[GenerationOutput]:
        """Answer all prompts, in their order, batched continuously.

        Args:
            prompts: texts or lists of token ids.
            sampling_params: one for all or one for each; None is greedy to the end of text. Only generated tokens'
                log-probabilities are returned (`logits` has the prompt's).
            seed: restarts the sampling generator before this call.
            states: for each prompt the state of the conversation that it goes on with, or None. What the state has read
                is not read again, nor counted as part of the sequence. An empty prompt goes on with the last answer.
            return_states: give each output the state after it. Of our own engine alone, like `states`.

        Raises:
            UserError: a prompt or parameter that cannot be served, or a stream that is still open; nothing has been
                generated then.
            PeerLostError: another rank ended while generating.
        """
        pieces = self.stream(prompts, sampling_params, seed=seed, states=states, return_states=return_states)
        outputs = {piece.index: piece.output for piece in pieces if piece.output}
        return [outputs[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Prompt],
        sampling_params: Params = None,
        *,
        seed: int | None = None,
        states: States = None,
        return_states: bool = False,
    ) -> Iterator[TextPiece]:
        """As `generate`, yielding each prompt's new tokens after every step; consume it on all ranks."""
        self._open_engine()

        def read() -> tuple[list[Request], int | None]:
            requests = self._reader.read(prompts, sampling_params, states, return_states)
            return requests, None if seed is None else check_seed(seed)

        requests, seed = self._agreed("stream", read, lambda read: {**told(read[0]), "seed": str(read[1])})
        return self._run(prompts, requests, seed)

    def warm_up(self) -> None:
        """What a server calls before its first request: our engine compiles its kernels and makes its CUDA graphs."""
        engine = self._open_engine()
        if isinstance(engine, SlotEngine):
            with lost_peers_reported(), self._step():
                engine.warm_up()

    def cache_prefix(self, prompt: Prompt) -> None:
        """Read `prompt` and keep the states after it: prompts that begin with its tokens are read from there on.

        Raises:
            UserError: see `generate`; or nothing is kept (`CacheLimits.prefix_bytes` is 0, or Megatron's engine runs).
        """
        self.prefix_counts()
        params = SamplingParams(temperature=0, num_tokens_to_generate=1)
        [request] = self._agreed("cache_prefix", lambda: self._reader.read([prompt], params), told)
        with lost_peers_reported():
            for _ in self._open_engine().run([replace(request, keep_state=True)], self._step):
                pass

    def prefix_counts(self) -> PrefixCounts:
        """How often prompts began with a kept prefix. Raises UserError: nothing is kept, see `cache_prefix`."""
        engine = self._open_engine()
        if not isinstance(engine, SlotEngine) or engine.prefixes is None:
            legal = "CacheLimits(prefix_bytes=...) with a model of SSM layers alone"
            raise UserError("prefix_bytes", 0, "keeps no prefixes", legal)
        return engine.prefixes.counts

    def save_state(self, state: ConversationState, directory: str | Path) -> None:
        """Write an output's state, each rank its part. Raises UserError: see `conversation.save_state`."""
        with self._step():
            save_state(state, directory, self.model.pg_collection.tp)

    def load_state(self, directory: str | Path) -> ConversationState:
        """What `save_state` wrote with as many ranks. Raises UserError: see `conversation.load_state`."""
        device = self.model.embedding.word_embeddings.weight.device
        with self._step():
            return load_state(directory, device, self.model.pg_collection.tp)

    def _agreed[T](self, call: str, read: Callable[[], T], told: Callable[[T], dict[str, str]]) -> T:
        """What `read` makes of a call's arguments: refused on all ranks if on any, or if they are told differently."""
        group = self.model.pg_collection.tp
        with self._step():
            found = agree(read, group)
            check_all_same({"call": call, **told(found)}, group)
        return found

    def _run(self, prompts: Sequence[Prompt], requests: list[Request], seed: int | None) -> Iterator[TextPiece]:
        started = time.monotonic()
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        answers = [
            Answer(index, text, request, self.tokenizer, started)
            for index, (text, request) in enumerate(zip(texts, requests, strict=True))
        ]
        with lost_peers_reported():
            for progress in self._open_engine().run(requests, self._step, seed):
                yield answers[progress.index].advance(progress)

    def _open_engine(self) -> SlotEngine | MegatronEngine:
        if self.engine is None:
            raise UserError("LLM", "this one", "is closed", "one that is not")
        return self.engine

    def close(self) -> None:
        """Let go of engine and peers. The model's memory is free when no one holds the LLM any longer."""
        if self._watch:
            self._watch.close()
        self._watch, self._step = None, nullcontext
        if self.engine:
            self.engine.close()
        self.engine = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @torch.no_grad()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits after every token of one sequence: float32 [len(token_ids), vocab_size], the padding stripped.

        Raises:
            UserError: no tokens, or one out of the vocabulary, or a stream that is still open.
        """
        ids = self._agreed(
            "logits",
            lambda: check_token_ids("token_ids", token_ids, self.limits),
            lambda ids: {"token_ids": in_few_letters(ids)},
        )
        device = self.model.embedding.word_embeddings.weight.device
        tokens = torch.tensor([ids], device=device)
        positions = torch.arange(len(ids), device=device)[None]
        with self._open_engine().alone(), lost_peers_reported(), megatron_on_cpu(), self._step():
            return self.model(tokens, positions, None, runtime_gather_output=True)[0].float()
