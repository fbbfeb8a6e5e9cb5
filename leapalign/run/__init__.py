"""A run: trainer, state, checkpoints, validation, tracking. No arithmetic of the method."""
