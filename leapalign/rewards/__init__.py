"""Differentiable rewards, one file each, and their place behind the VAE. How a gradient is taken lies elsewhere."""

# name -> its one object; the config accepts these names. A new one is a file, a line here, and a test.
REWARDS = {
    "shapes": "leapalign.rewards.shapes:reward",
    "pickscore": "leapalign.rewards.pickscore:reward",
    "clipscore": "leapalign.rewards.clipscore:reward",
}
