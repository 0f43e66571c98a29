"""How tokens come out: checkpoint and layers joined, under Megatron's inference engine."""
