"""Megatron's HybridStack without Transformer Engine, acceptable to the dynamic inference context."""

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from .norm import LocalRMSNorm


class SSMStack(HybridStack):
    """Differs from HybridStack in two points, both of construction:

    - the final norm is LocalRMSNorm (HybridStack hard-codes Transformer Engine's);
    - a stack without attention lists a phantom attention layer behind the real ones, because DynamicInferenceContext
      refuses models without any. No module stands behind it and nothing writes its cache; `inference.state` sizes
      that cache to next to nothing.
    """

    def __init__(self, *args, post_layer_norm: bool = True, **kwargs) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            config = self.config
            self.final_norm = LocalRMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        if Symbols.ATTENTION not in self.layer_type_list:
            self.layer_type_list = [*self.layer_type_list, Symbols.ATTENTION]
