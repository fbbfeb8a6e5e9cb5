"""Ways to compute the gradients of a surrogate, one file each. No method and no reward is known here."""
