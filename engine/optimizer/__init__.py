"""The optimizers over a streamed model's store, and the average of weights. No passes."""
