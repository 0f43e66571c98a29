"""What is computed while partial sums travel: ways that are asked for, as what they bring depends on the links."""

from ..config import Mamba1Config, ModelConfig
from ..errors import UserError
from .mamba1_mixer import Mamba1Mixer
from .model import SSMModel

HALVES, X_PROJ = "halves", "x_proj"
WAYS = (HALVES, X_PROJ)


def check_overlap(config: ModelConfig, way: object, tokens: object) -> None:
    """Raises UserError: `set_overlap` would be of no use to a model of this config."""
    if way not in WAYS:
        raise UserError("tp_overlap", way, "hides no reduction", ", ".join(WAYS))
    if tokens is None:
        if way != HALVES:
            raise UserError("tp_overlap", way, "is of no pass", "beside tp_overlap_from")
        return
    if type(tokens) is not int or tokens < 1:
        raise UserError("tp_overlap_from", tokens, "is no number of tokens", "an integer from 1, or None")
    if way == HALVES and not config.is_pure_ssm:
        raise UserError("tp_overlap_from", tokens, "the model has other layers than SSMs", "None")
    if way == X_PROJ and not isinstance(config.mixer, Mamba1Config):
        raise UserError("tp_overlap", way, "the model has no x_proj", HALVES)


def overlap_from(model: SSMModel) -> int | None:
    """What `set_overlap` was given."""
    behind = [module.z_behind_from for module in model.modules() if isinstance(module, Mamba1Mixer)]
    return model.decoder.overlap_from or next(iter(behind), None)


def set_overlap(model: SSMModel, way: str, tokens: int | None) -> None:
    """Have passes of `model` over so many tokens or more hide reductions; None: none does.

    Args:
        way: "halves" takes the prompts' tokens in two halves, one's out_proj summed while the other computes
            (halves.py); "x_proj" has Mamba-1's x_proj summed while z's half of in_proj is computed.
    """
    model.decoder.overlap_from = tokens if way == HALVES else None
    for mixer in (module for module in model.modules() if isinstance(module, Mamba1Mixer)):
        mixer.z_behind_from = tokens if way == X_PROJ else None
