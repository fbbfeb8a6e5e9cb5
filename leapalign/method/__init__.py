"""The method: noise levels, rollout, draws, surrogates, alignment gradients. No files, no command line."""
