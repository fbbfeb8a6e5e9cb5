"""What runs inside a transformer block: norms, modulation, residuals, rotary embedding. No leaps, no optimizer."""
