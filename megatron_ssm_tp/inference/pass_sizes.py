"""Sizes of passes that are CUDA graphs, to which shorter ones are padded.

A graph saves the host's time to launch a pass, and costs what the device computes for the padding. Up to 1024 tokens
sizes double, for such passes take as long as their weights are read. Longer ones are a quarter to an eighth apart, and
there are none that keep the device busy for longer than the host takes to launch them.
"""

from torch import nn

SHORT, SHORT_PROMPTS = (16, 32, 64, 128, 256, 512, 1024), (1, 4, 16)
LONG, LONG_PROMPTS = (1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192), (1, 4)
# Of an H100's host and of its 16-bit products with what is around them; see docs/performance.md.
LAUNCH_SECONDS_A_LAYER, FLOPS = 1e-3, 4.5e14


class PassSizes:
    """Sizes (tokens, prompts), in ascending order.

    Args:
        most: tokens; only SHORT may be longer.
    """

    def __init__(self, most: int) -> None:
        long = [tokens for tokens in LONG if tokens <= most]
        self.all = [(tokens, prompts) for tokens in SHORT for prompts in SHORT_PROMPTS]
        self.all += [(tokens, prompts) for tokens in long for prompts in LONG_PROMPTS]

    @classmethod
    def of(cls, layers: nn.ModuleList) -> "PassSizes":
        """For a model of these layers, of which every rank has as many parameters."""
        parameters = sum(parameter.numel() for parameter in layers.parameters())
        return cls(int(len(layers) * LAUNCH_SECONDS_A_LAYER * FLOPS / (2 * max(1, parameters))))

    def holding(self, tokens: int, prompts: int) -> tuple[int, int] | None:
        """The least size for so many; None: there is none."""
        return next((size for size in self.all if size[0] >= tokens and size[1] >= prompts), None)

    def up_to(self, tokens: int) -> list[tuple[int, int]]:
        """Those that passes of at most so many tokens need."""
        last = next((size for size, _ in self.all if size >= tokens), self.all[-1][0])
        return [size for size in self.all if size[0] <= last]
