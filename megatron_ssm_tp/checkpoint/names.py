"""Where a checkpoint keeps our parameters: rules from our names to the file's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..partition.parameters import Parameter

if TYPE_CHECKING:  # `plan` reads names and starts without torch
    import torch


@dataclass(frozen=True)
class HeadsFirst:
    """A file's tensor with a leading dimension of heads; ours has the heads' channels side by side on `axis`."""

    name: str
    axis: int


# A rule's key is one of our names, or the beginning of some that ends in a dot; its value is what stands there in the
# file, of one tensor or of one for each band of ours.
Rule = str | tuple[str, ...] | HeadsFirst
Rules = Mapping[str, Rule]


@dataclass(frozen=True)
class Stored:
    """One of our parameters in a file: in one tensor, or in one for each band of its packing.

    `heads_axis` is HeadsFirst's axis, with `heads` of them; None: the file's tensors lie as ours do.
    """

    names: tuple[str, ...]
    heads_axis: int | None = None
    heads: int = 1

    def shapes(self, parameter: Parameter) -> list[tuple[int, ...]]:
        """The shapes of the file's tensors."""
        shape = parameter.shape
        if self.heads_axis is not None:
            axis = self.heads_axis
            return [(self.heads, *shape[:axis], shape[axis] // self.heads, *shape[axis + 1 :])]
        if len(self.names) == 1:
            return [shape]
        axis = parameter.axis
        return [(*shape[:axis], band.size, *shape[axis + 1 :]) for band in parameter.packing.bands]

    def arranged(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """A whole tensor of the file (`heads_axis` is set) as ours."""
        return tensor.movedim(0, self.heads_axis).flatten(self.heads_axis, self.heads_axis + 1)


def stored(rules: Rules, ours: str, heads: int = 1, **places: int) -> Stored:
    """Where `ours` is, by the longest rule that covers it; `places` fill the {layer}s of its value.

    Raises:
        KeyError: no rule covers it.
    """
    covering = [key for key in rules if ours == key or (key.endswith(".") and ours.startswith(key))]
    if not covering:
        raise KeyError(ours)
    key = max(covering, key=len)
    value, rest = rules[key], ours[len(key) :]
    if isinstance(value, HeadsFirst):
        return Stored((value.name.format(**places) + rest,), value.axis, heads)
    values = value if isinstance(value, tuple) else (value,)
    return Stored(tuple(text.format(**places) + rest for text in values))


def mixer_rules(ours: str, theirs: str) -> Rules:
    """An SSM mixer of Hugging Face's, whose convolution is a module."""
    return {
        ours: theirs,
        f"{ours}conv1d_weight": f"{theirs}conv1d.weight",
        f"{ours}conv1d_bias": f"{theirs}conv1d.bias",
    }


def attention_rules(ours: str, theirs: str) -> Rules:
    projections = tuple(f"{theirs}{name}_proj." for name in "qkv")
    return {f"{ours}qkv.": projections, f"{ours}out_proj.": f"{theirs}o_proj."}


def gated_mlp_rules(ours: str, theirs: str) -> Rules:
    return {f"{ours}up.": (f"{theirs}gate_proj.", f"{theirs}up_proj."), f"{ours}down.": f"{theirs}down_proj."}
