from collections.abc import Sequence

from torch import Tensor

class Job:
    def done(self) -> bool: ...
    def wait(self) -> float: ...

def adamw8bit(
    weights: Tensor,
    gradient: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    codes_m: Tensor,
    absmax_m: Tensor,
    codes_v: Tensor,
    absmax_v: Tensor,
    residual: Tensor | None,
    master: Tensor | None,
    ema: Tensor | None,
    seed: int,
    step: int,
    parameter: int,
    first: int,
    gain: float,
    decay_m: float,
    decay_root: float,
    unit: float,
    root_gain: float,
    eps: float,
    decay_w: float,
    gain_ema: float,
    guarded: bool,
    threads: int,
) -> Job: ...
def round_stochastic(
    x: Tensor, out: Tensor, seed: int, step: int, parameter: int, offset: int, threads: int
) -> Job: ...
def sum_of_squares(x: Tensor, threads: int) -> Job: ...
def accumulate(sum: Tensor, x: Tensor, threads: int) -> Job: ...
def ema(
    average: Tensor, weights: Tensor, gain: float, seed: int, step: int, parameter: int, first: int, threads: int
) -> Job: ...
def copy(to: Tensor, source: Tensor, threads: int) -> Job: ...
def isas() -> list[str]: ...
def use_isa(name: str) -> None: ...
def isa() -> str: ...
def pin(cores: Sequence[int]) -> None: ...
def stop() -> None: ...
