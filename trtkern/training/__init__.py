"""Training: settings, the one loop, checkpoints, and what is shown of it."""
