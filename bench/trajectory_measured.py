"""A point of memory against trajectory length, measured: real tensors on the CPU, in a process of its own.

Two things are measured, in two runs of the same step:

- live bytes of tensors, seen where operators are dispatched: from the operator that first shows a storage until it is
  freed. Memory that the engine maps for the host (weights, gradients, block inputs that wait) is told from what would
  be on a GPU by who made it: a mapping, not torch's allocator. Scratch memory inside an operator is not seen.
- the process's own peak of resident memory, above what it had before the model was made; a first run has made all that
  is made only once. It includes everything, the host's part of the engine as well.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.simulate import Workload, latents_shape, make_conditioning, make_transformer
from bench.trajectory_points import ENGINE, engine_workload, run_graph
from leapalign.engine.arena import HostArena
from leapalign.engine.counting import DeviceCounter, tensors
from leapalign.engine.gradients import accumulation
from leapalign.engine.ledger import Ledger, resident_bytes
from leapalign.engine.modulation import OuterProduct
from leapalign.engine.plan import MemoryPlan
from leapalign.engine.streamed import StreamedModel
from leapalign.engine.units import default_dtype
from leapalign.engine.velocity import velocity
from leapalign.rollout import rollout
from leapalign.streamed import streamed_rollout, streamed_vjps
from leapalign.surrogates import last_steps

_MMAP_THRESHOLD, _KEPT = -3, 2**15  # mallopt's option; larger blocks go back to the system when they are freed


def measure(workload: Workload, method: str) -> dict[str, int]:
    """A point measured in a fresh process; `workload.legs` is the number of differentiated steps.

    Returns:
        peak_bytes: live tensors that a GPU would hold.
        host_bytes: live tensors in the engine's host memory.
        resident_bytes: the process's peak above what it had before the model; left out where the system does not tell.

    Raises:
        RuntimeError: the process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, and every point's process begins as a copy of that
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, workload, method))
    process.start()
    there.close()
    try:
        found: dict[str, int] = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measures {method} died with exit code {process.exitcode}") from None
    process.join()
    return found


def _answer(pipe: Any, workload: Workload, method: str) -> None:
    torch.set_num_threads(1)
    pipe.send(measure_here(workload, method))
    pipe.close()


def measure_here(workload: Workload, method: str) -> dict[str, int]:
    """`measure` in this process: what ran here before is in its resident memory."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(_MMAP_THRESHOLD, _KEPT)
    live = LiveTensors()
    with live:
        _step(workload, method)
    gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    before, ledger = resident_bytes(), Ledger("cpu")
    with ledger.phase("step"):
        _step(workload, method)
    found = {"peak_bytes": live.device.peak, "host_bytes": live.host.peak}
    most = ledger.phases["step"].host_bytes
    if before is not None and most is not None:
        found["resident_bytes"] = most - before
    return found


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators show while it is active.

    Attributes:
        device: of torch's allocator: what a GPU would hold.
        host: of mappings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device, self.host = DeviceCounter(), DeviceCounter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._hold([*tensors(args), *tensors(kwargs), *tensors(result)], func)
        return result

    def _hold(self, values: Iterable[Tensor], operator: Any) -> None:
        for value in values:
            mapped = not value.untyped_storage().resizable()
            (self.host if mapped else self.device).hold([value], operator)


class _HostGradients:
    """A sink that keeps every gradient in the engine's host memory, as an optimizer there would read it."""

    on_host = True

    def __init__(self, transformer: nn.Module, dtype: torch.dtype) -> None:
        parameters = dict(transformer.named_parameters())
        self._arena = HostArena({name: p.numel() * dtype.itemsize for name, p in parameters.items()}, pin=False)
        self._grads = {name: self._arena[name].view(dtype).view(p.shape) for name, p in parameters.items()}

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        for name, gradient in gradients.items():
            whole = self._grads[name]
            if isinstance(gradient, OuterProduct):
                for rows, tile in gradient.tiles(2**22, dtype=whole.dtype):
                    whole[rows] = tile
            else:
                whole.copy_(gradient)


def _step(workload: Workload, method: str) -> None:
    """Make the model, roll out, and take the gradient of the last steps."""
    torch.manual_seed(0)
    with default_dtype(workload.dtype):
        transformer = make_transformer(workload).eval()
    conditioning = {name: torch.randn_like(value) for name, value in make_conditioning(workload, "cpu").items()}
    noise, g = torch.randn(2, *latents_shape(workload))
    sigmas = torch.linspace(1, 0, workload.steps + 1)
    if method in ENGINE:
        _engine_step(engine_workload(workload, method), transformer, conditioning, noise, sigmas, g)
    elif method == "leapalign_one_graph":
        trajectory = rollout(transformer, conditioning, noise, sigmas)
        # Whichever pair is drawn: the cost is the same.
        run_graph(method, transformer, conditioning, trajectory.latents[-3:].clone(), sigmas[-3:], g)
    else:
        latents, first = noise, workload.steps - workload.legs
        with torch.no_grad():
            for i in range(first):
                latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity(
                    transformer, latents, sigmas[i], conditioning
                )
        run_graph(method, transformer, conditioning, latents[None], sigmas[first:], g)


def _engine_step(
    workload: Workload, transformer: nn.Module, conditioning: Mapping[str, Tensor], noise: Tensor, sigmas: Tensor,
    g: Tensor,
) -> None:  # fmt: skip
    sink = _HostGradients(transformer, accumulation(workload.dtype))
    steps = [list(range(workload.steps - workload.legs, workload.steps))] * workload.batch
    plan = MemoryPlan(
        microbatch=workload.plan.microbatch,
        resident=workload.plan.resident,
        mode=workload.mode,
        keep_block_inputs=workload.keep_block_inputs,
        kernels="torch",
    )
    model = StreamedModel(transformer, plan, device="cpu")
    try:
        rolled = streamed_rollout(
            model, conditioning, noise, sigmas, steps, keep_block_inputs=workload.keep_block_inputs
        )
        surrogate = last_steps(rolled.trajectory, workload.legs)
        streamed_vjps(model, conditioning, rolled, surrogate, g, mode=workload.mode, sink=sink)
        rolled.drop()
    finally:
        model.close()
