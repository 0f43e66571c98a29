"""The mathematics, one process at a time: `reference` in torch is the truth that kernels are held to."""
