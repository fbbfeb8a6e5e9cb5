"""Every random draw of a run, as a pure function of (seed, step, sample index).

No draw depends on the batch it is made in, on the microbatch, on the rank count or on what was drawn before, so a
resumed or differently split run sees the same noise and the same pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from leapalign.method.surrogates import Method


def sample_generator(seed: int, step: int, sample: int, stream: str = "noise") -> torch.Generator:
    """A CPU generator keyed by a hash of (stream, seed, step, sample); neighbouring keys give unrelated streams.

    torch's CPU generator is seeded by 32 bits, so two samples of a run share a stream with probability 2^-32.
    """
    key = hashlib.blake2b(f"{stream}/{seed}/{step}/{sample}".encode(), digest_size=4).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(key, "little"))


def draw_noise(seed: int, step: int, samples: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise of the given samples: (len(samples), *shape) float32 on the CPU."""
    rows = [torch.randn(*shape, generator=sample_generator(seed, step, sample, "noise")) for sample in samples]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def draw_steps(method: Method, seed: int, step: int, samples: Sequence[int], num_steps: int) -> Tensor:
    """(len(samples), method.legs) rollout steps at which each sample is differentiated, drawn as the method draws."""
    rows = [method.draw(1, num_steps, sample_generator(seed, step, sample, "pairs")) for sample in samples]
    return torch.cat(rows) if rows else torch.empty(0, method.legs, dtype=torch.int64)


def random_pairs(batch: int, num_steps: int, generator: torch.Generator) -> Tensor:
    """(batch, 2) pairs k_index < j_index < num_steps, uniform over the unordered pairs; on the generator's device."""
    ranks = torch.randint(_count_pairs(num_steps), (batch,), generator=generator, device=generator.device)
    return unrank_pairs(ranks, num_steps)


def unrank_pairs(ranks: Tensor, num_steps: int) -> Tensor:
    """(B,) ranks below num_steps (num_steps - 1) / 2 -> (B, 2) pairs k < j, in the order (0,1) (0,2) (1,2) (0,3) ..."""
    j, k = torch.tril_indices(num_steps, num_steps, offset=-1, device=ranks.device)
    return torch.stack([k[ranks], j[ranks]], dim=1)


def draw_prompts(seed: int, step: int, batch: int, num_prompts: int) -> list[int]:
    """Prompt indices of one step: shuffled epochs without replacement, a pure function of (seed, step).

    The step's prompts are the positions step * batch ... step * batch + batch - 1 of the endless sequence of epochs,
    each epoch a permutation keyed by (seed, epoch).
    """
    if batch < 1 or num_prompts < 1:
        raise ValueError(f"batch={batch} and num_prompts={num_prompts} must both be at least 1")
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, num_prompts)
        if epoch not in orders:
            generator = sample_generator(seed, epoch, 0, "prompts")
            orders[epoch] = torch.randperm(num_prompts, generator=generator).tolist()
        chosen.append(orders[epoch][place])
    return chosen


def _count_pairs(num_steps: int) -> int:
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}: a pair needs at least 2 rollout steps")
    return num_steps * (num_steps - 1) // 2
