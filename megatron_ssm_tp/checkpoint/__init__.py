"""What is on disk: which family a checkpoint is, how to read it a tensor at a time, how to write it."""
