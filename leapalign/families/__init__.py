"""Model families, one file each: latents, guidance, noise levels, prompts, position ids, published shapes."""
