"""States of 8-bit AdamW to and from those of bitsandbytes, as a contract: its own decoder, and what it cannot hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from leapalign.kernels.adamw8bit.definition import from_bitsandbytes, to_bitsandbytes
from leapalign.kernels.adamw8bit.quantize import BLOCK, dequantize, signed_map, unsigned_map
from tests.kernels.adamw8bit.states import moments_of, state, used_state

EPS = 2.0**-24  # half a unit in the last place of float32, relative
TOTAL = 9 * BLOCK + 31


def half_gaps() -> Tensor:
    """(256,) how far, at most, a number may be from the value of its code in the unsigned map."""
    gaps = torch.nn.functional.pad(unsigned_map().diff(), (1, 1))
    return torch.maximum(gaps[:-1], gaps[1:]) / 2 + 4 * EPS


def by_element(absmax: Tensor) -> Tensor:
    return absmax.repeat_interleave(BLOCK)[:TOTAL]


def test_bitsandbytes_reads_the_converted_state() -> None:
    functional: Any = pytest.importorskip(
        "bitsandbytes.functional", reason="compares with bitsandbytes: pip install 'leapalign[bnb]'"
    )
    moments = used_state(TOTAL, 26)
    m, root = moments_of(moments)
    theirs = to_bitsandbytes(*moments)
    read_m, read_v = (
        functional.dequantize_blockwise(
            theirs[f"state{i}"], absmax=theirs[f"absmax{i}"], code=theirs[f"qmap{i}"], blocksize=BLOCK
        )
        for i in (1, 2)
    )
    assert torch.equal(theirs["qmap1"], signed_map()) and torch.equal(theirs["qmap2"], unsigned_map())
    assert torch.equal(read_m, m)
    v, codes, peaks = root.square(), theirs["state2"].long(), by_element(theirs["absmax2"])
    lowest = codes == 1  # in place of code 0 too, by which bitsandbytes would divide
    assert (codes > 0).all() and 0 < lowest.sum() < TOTAL / 2
    assert ((read_v - v).abs() <= half_gaps()[codes] * peaks)[~lowest].all()
    assert (v <= 5.6e-7 * peaks)[lowest].all()


def test_a_round_trip_keeps_m_and_the_v_that_bitsandbytes_has() -> None:
    moments = used_state(TOTAL, 27)
    theirs = to_bitsandbytes(*moments)
    back = from_bitsandbytes(theirs)
    assert torch.equal(back[0], moments[0]) and torch.equal(back[1], moments[1])
    kept = dequantize(theirs["state2"], theirs["absmax2"], map=unsigned_map()).sqrt()
    root, again = moments_of(moments)[1], moments_of(back)[1]
    assert ((again - kept).abs() <= half_gaps()[back[2].long()] * by_element(back[3])).all()
    # What there was before comes back within 7.3% over a tenth of the largest: at 0.1, v is 0.01 of the largest, in a
    # decade with gaps of 0.09 / 64: ±3.5% of √v; √v has gaps of 0.9 / 128 from there on: ±3.5%. Above it is less.
    upper = root >= 0.1 * by_element(moments[3])
    assert upper.sum() > TOTAL / 50
    assert ((again - root).abs() <= 0.073 * root)[upper].all()


def test_v_that_bitsandbytes_has_lost_is_read_as_its_smallest() -> None:
    theirs = to_bitsandbytes(*used_state(TOTAL, 27))
    theirs["state2"][1:BLOCK:2] = 0
    back = from_bitsandbytes(theirs)
    smallest = math.sqrt(3.25e-7) * back[3][0].item()
    # Between 1e-4 and 1e-3 √v's map has gaps of 0.9e-3 / 16.
    assert ((moments_of(back)[1][1:BLOCK:2] - smallest).abs() <= 0.9e-3 / 32 * 1.001 * back[3][0]).all()
    fresh = from_bitsandbytes(to_bitsandbytes(*state(TOTAL)))
    assert moments_of(fresh)[1].eq(0).all()


def test_foreign_states_are_refused() -> None:
    theirs = to_bitsandbytes(*used_state(TOTAL, 28))
    shaped = {**theirs, "state1": theirs["state1"][:2310].view(33, 70), "state2": theirs["state2"][:2310].view(33, 70)}
    assert from_bitsandbytes(shaped)[2].shape == (2310,)
    with pytest.raises(ValueError, match="absmax2 has 9 values for 2335 elements; 10 make blocks of 256"):
        from_bitsandbytes({**theirs, "absmax2": theirs["absmax2"][:9]})
    with pytest.raises(ValueError, match="qmap1 is not bitsandbytes' dynamic map"):
        from_bitsandbytes({**theirs, "qmap1": theirs["qmap2"]})
