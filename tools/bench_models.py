"""Models for bench_inference.py, their weights random and made on the device: this package's, and mamba-ssm's."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.inference.contexts import DynamicInferenceContext
from megatron.core.inference.inference_request import DynamicInferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import nn

from megatron_ssm_tp.comm.recipe_book import RecipeBook
from megatron_ssm_tp.comm.recipes import NONE, AllReduceRecipe, recipe_by_name
from megatron_ssm_tp.compat.cpu import megatron_on_cpu
from megatron_ssm_tp.config import Mamba1Config, ModelConfig
from megatron_ssm_tp.inference.engine import SlotEngine
from megatron_ssm_tp.inference.engines import build_engine
from megatron_ssm_tp.inference.megatron_engine import megatron_inference
from megatron_ssm_tp.inference.modes import inference_active
from megatron_ssm_tp.inference.prompts import Reader
from megatron_ssm_tp.inference.requests import Limits
from megatron_ssm_tp.inference.slots import SlotTable
from megatron_ssm_tp.inference.state import CacheLimits, inference_config
from megatron_ssm_tp.inference.tokenizer import NoTokenizer
from megatron_ssm_tp.layers.model import build_model

SEED = 1
AUTO = "auto"  # sums between ranks as the engine chooses


class Pass(NamedTuple):
    """A forward pass: `run` returns logits [prompts, vocab_size] of the last tokens; `refresh` restores states."""

    run: Callable[[], torch.Tensor]
    refresh: Callable[[], object] | None = None


def draw_tokens(batch: int, length: int, vocab_size: int) -> torch.Tensor:
    """int64 [batch, length] on the CPU, the same at every call and on every rank."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED))


def reader(table: SlotTable, vocab_size: int, longest: int) -> Reader:
    """What reads requests of token ids, as LLM's calls are read."""
    return Reader(_no_words(vocab_size), Limits(vocab_size, longest), (), table)


def _no_words(vocab_size: int) -> NoTokenizer:
    return NoTokenizer(Path("weights at random"), vocab_size, -1)


class Ours:
    """This package's model, cut over the ranks, its weights drawn as for training from scratch."""

    def __init__(
        self,
        config: ModelConfig,
        groups: ProcessGroupCollection,
        device: torch.device,
        dtype: torch.dtype,
        longest: int,
        **overrides: object,
    ) -> None:
        """`overrides` go to Megatron's TransformerConfig."""
        self.config, self.groups = config, groups
        with megatron_on_cpu():
            torch.manual_seed(SEED)
            if device.type == "cuda":
                capturable = {"use_cudagraphable_rng": True} if overrides.get("cuda_graph_impl") else {}
                model_parallel_cuda_manual_seed(SEED, force_reset_rng=True, **capturable)
            overrides = {"perform_initialization": True, **overrides}
            self.model = build_model(config, groups, dtype, device, longest + 1, **overrides)
        self.model.eval().requires_grad_(False)

    @property
    def parameters_here(self) -> int:
        """Parameters on this rank."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def engine(self, slots: int, max_tokens: int) -> SlotEngine:
        """Our engine around the model, which has SSM layers alone; states are float32. Raises UserError: so many slots
        do not fit."""
        limits = CacheLimits(slots, max_tokens)
        return build_engine("slots", self.model, self.config, _no_words(self.config.vocab_size), limits, None, 0)

    def prefill(self, batch: int, length: int) -> Pass:
        """A pass over `batch` prompts, packed, in the engine's own context and with its own wrapper around the model.

        What the engine does between passes is left out: lists of requests, and sampling.
        """
        limits = CacheLimits(batch, batch * length, length + 1, max_cached_tokens=batch * (length + 1))
        cache = inference_config(self.model, self.config, limits, self.groups)
        sampling = SamplingParams(num_tokens_to_generate=1, termination_id=-1)
        with megatron_inference():
            context = DynamicInferenceContext(self.model.config, cache)
            wrapped = GPTInferenceWrapper(self.model, context)
            wrapped.prep_model_for_inference()
            for index, prompt in enumerate(draw_tokens(batch, length, self.config.vocab_size)):
                context.add_request(
                    DynamicInferenceRequest(request_id=index, prompt_tokens=prompt, sampling_params=sampling)
                )
            context.initialize_attention_state()
            tokens, positions = context.current_input_and_position_ids()
        given = {"tokens": tokens, "position_ids": positions, "attention_mask": None}

        def run() -> torch.Tensor:
            with megatron_inference(), torch.inference_mode():
                return wrapped.run_one_forward_step(given)[0]

        def forget() -> None:
            context.mamba_conv_states.zero_()
            context.mamba_ssm_states.zero_()

        return Pass(run, forget)

    def engine_pass(self, batch: int, length: int) -> Pass:
        """As `prefill`, by our engine: a CUDA graph where it would make one."""
        parts = list(enumerate(draw_tokens(batch, length, self.config.vocab_size).tolist()))

        @cache
        def engine_of(layers: int) -> SlotEngine:  # without layers another one, for graphs are of those that there were
            with torch.inference_mode(False):
                return self.engine(batch, batch * length)

        def engine() -> SlotEngine:
            return engine_of(len(self.model.decoder.layers))

        def run() -> torch.Tensor:
            with inference_active(), torch.inference_mode():
                return engine().passes.logits(parts, batch)[0]

        def forget() -> None:
            engine().table.conv.zero_()
            engine().table.ssm.zero_()

        return Pass(run, forget)

    def without_layers(self) -> AbstractContextManager[None]:
        """Within it a pass is embedding, final norm and head."""
        return _without_layers(self.model.decoder)


@contextmanager
def _without_layers(stack: nn.Module) -> Iterator[None]:
    layers, stack.layers = stack.layers, nn.ModuleList()
    try:
        yield
    finally:
        stack.layers = layers


class MambaSsm:
    """mamba-ssm's MambaLMHeadModel of the same sizes. Raises ImportError where it is not installed."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        from mamba_ssm.models.config_mamba import MambaConfig
        from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

        torch.manual_seed(SEED)
        self.vocab_size, self.device = config.vocab_size, device
        theirs = MambaConfig(
            d_model=config.hidden_size,
            n_layer=len(config.layers),
            vocab_size=config.vocab_size,
            ssm_cfg=ssm_cfg(config),
            rms_norm=True,
            residual_in_fp32=config.residual_in_fp32,
            fused_add_norm=True,
            pad_vocab_size_multiple=1,
            tie_embeddings=config.tied_embeddings,
        )
        self.model = MambaLMHeadModel(theirs, device=device, dtype=dtype).eval()

    def prefill(self, batch: int, length: int) -> Pass:
        """A pass over [batch, length] tokens, which keeps no states: its fastest."""
        tokens = draw_tokens(batch, length, self.vocab_size).to(self.device)

        def run() -> torch.Tensor:
            with torch.inference_mode():
                return self.model(tokens, num_last_tokens=1).logits[:, -1]

        return Pass(run)

    def without_layers(self) -> AbstractContextManager[None]:
        """As Ours.without_layers."""
        return _without_layers(self.model.backbone)


def ssm_cfg(config: ModelConfig) -> dict:
    """mamba-ssm's arguments of a mixer."""
    mixer = config.mixer
    common = {"d_state": mixer.d_state, "d_conv": mixer.d_conv, "expand": mixer.d_inner // config.hidden_size}
    if isinstance(mixer, Mamba1Config):
        return {"layer": "Mamba1", **common, "dt_rank": mixer.dt_rank}
    return {"layer": "Mamba2", **common, "headdim": mixer.head_dim, "ngroups": mixer.n_groups}


def no_rival(config: ModelConfig, ranks: int) -> str:
    """Why mamba-ssm cannot run this model, or nothing."""
    if ranks > 1:
        return f"runs on one GPU, and this is {ranks} ranks"
    if not config.is_pure_ssm:
        return "has no such layers as this model's hybrid ones"
    if config.mixer.d_inner % config.hidden_size:
        return "has no mixer of these sizes"
    return ""


def rival_of(
    config: ModelConfig, groups: ProcessGroupCollection, device: torch.device, dtype: torch.dtype
) -> tuple[MambaSsm | None, str]:
    """mamba-ssm's model, or None and why there is none."""
    missing = no_rival(config, groups.tp.size())
    if missing:
        return None, missing
    try:
        return MambaSsm(config, device, dtype), ""
    except ImportError as error:
        return None, f"cannot be imported ({error})"


def recipes_of(name: str) -> AllReduceRecipe | RecipeBook | str | None:
    """A recipe by its name, or those that a YAML file gives the sites; AUTO leaves it to the engine, "none" is
    Megatron's all-reduce. Raises UserError: there is none, or not so."""
    if name.endswith((".yaml", ".yml")):
        return RecipeBook.from_yaml_file(name)
    return None if name == AUTO else recipe_by_name(name) or NONE


def differences(config: ModelConfig) -> list[str]:
    """What mamba-ssm's model of the same sizes does not compute, or does otherwise."""
    found = ["it keeps no states behind, ours does"]
    if isinstance(config.mixer, Mamba1Config) and config.mixer.bcdt_norm_eps is not None:
        found.append("it has no norms on dt, B and C, ours has")
    return found


def free_memory() -> None:
    """Give back what is no longer referenced."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
