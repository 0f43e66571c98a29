"""How tensors are cut between tensor-parallel ranks: pure arithmetic, torch only in `apply`."""
