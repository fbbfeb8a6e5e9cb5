"""What comes in: prompts and their embeddings. No training."""
