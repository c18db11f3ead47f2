"""Training: stages, loop, losses, engines, checkpoints."""
