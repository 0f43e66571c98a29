"""What Megatron's wheel or a machine without CUDA needs, and nothing else."""
