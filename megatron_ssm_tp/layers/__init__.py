"""What each rank runs: Megatron modules for state-space models, plugged in by spec."""
