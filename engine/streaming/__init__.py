"""What moves between host and device: copies, slots, weights, gradients, activations. No arithmetic of models."""
