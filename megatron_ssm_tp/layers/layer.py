"""Megatron's MambaLayer, x + mixer(norm(x)), for mixers of every kind."""

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class MixerLayer(MambaLayer):
    """A layer whose mixer may also be attention or an MLP: HybridStack builds those with more arguments.

    Stages of a pipeline and multi-token prediction are not told apart here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        name: str | None = None,
        is_mtp_layer: bool = False,
        add_layer_offset: bool = False,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, pp_layer_offset, name)
