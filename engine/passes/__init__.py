"""Forward and backward passes of a streamed model, block by block. No optimizer, no planning."""
