"""One training loop, checkpoints, resume, distribution."""
