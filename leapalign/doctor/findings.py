"""What an examination of a machine found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from leapalign import __version__
from leapalign.doctor.system import Disk, Gpu, Host
from leapalign.engine.planning.rates import CopyRates, HostRates


@dataclass(frozen=True)
class Verdict:
    """Whether a preset fits into what is free on this machine.

    Attributes:
        text: "fits" and what it would take, or what is missing.
        seconds: predicted for a step; None where it does not fit, and on a CPU.
        device_bytes, host_bytes: predicted peaks; None where it does not fit.
        checkpoint_bytes: of one checkpoint; None where it does not fit, or no run writes any.
        checkpoints: that a run keeps, and the one being written.
        planned_only: `leapalign align` does not train it, whether it fits or not.
    """

    name: str
    fits: bool
    text: str
    seconds: float | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    checkpoint_bytes: int | None = None
    checkpoints: int = 2
    planned_only: bool = False


@dataclass(frozen=True)
class Rates:
    """What was measured; None: it was not, `notes` of the examination say why.

    Attributes:
        matmul_flops_per_s: bfloat16 products, on the GPU or, without one, on the CPU.
        copies: between host and GPU.
        host: of the host kernels' threads.
    """

    matmul_flops_per_s: float | None
    copies: CopyRates | None
    host: HostRates

    def machine(self, gpu: bool) -> dict[str, Any]:
        """Those of `Machine`'s rates that are known: without a GPU those of the host alone."""
        found: dict[str, Any] = {"host_bytes_per_s": self.host.in_place}
        if gpu and self.matmul_flops_per_s is not None:
            found["flops_per_s"] = self.matmul_flops_per_s
        if gpu and self.copies is not None:  # a step copies both ways at once
            found["h2d_bytes_per_s"] = self.copies.h2d_together
            found["d2h_bytes_per_s"] = self.copies.d2h_together
        return found


@dataclass(frozen=True)
class Examination:
    """All that was found.

    Attributes:
        gpu: None without one, `no_gpu` says why.
        locked_bytes: of host memory that CUDA locked at once; None without a GPU.
        lock_error: what stopped it there, if anything.
        notes: what could not be measured, and why.
    """

    device: str
    gpu: Gpu | None
    no_gpu: str
    host: Host
    disk: Disk
    rates: Rates
    locked_bytes: int | None
    lock_error: str
    software: dict[str, str | None]
    notes: tuple[str, ...] = ()
    presets: tuple[Verdict, ...] = ()

    @property
    def machine(self) -> dict[str, Any]:
        """For `leapalign plan --machine`: the rates that were measured, and no others."""
        return self.rates.machine(self.gpu is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"leapalign": __version__, "machine": self.machine, **asdict(self)}
