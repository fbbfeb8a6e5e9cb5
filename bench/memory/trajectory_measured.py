"""A point of memory against trajectory length, measured with real tensors.

On a GPU: the peak of torch's allocator. On the CPU, in a process of its own, two things in two runs of the same step:

- live bytes of tensors (bench/memory/live_tensors.py): those that a GPU would hold apart from those that the engine
  keeps in host memory (weights, gradients, block inputs that wait);
- the process's own peak of resident memory, above what it had before the model was made; a first run has made all that
  is made only once. It includes everything, the host's part of the engine as well.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.memory.live_tensors import LiveTensors
from bench.memory.simulate import SEED, Workload, latents_shape, make_conditioning, make_transformer
from bench.memory.trajectory_points import ENGINE, engine_workload, run_graph
from leapalign.engine.backbones.modulation import OuterProduct
from leapalign.engine.backbones.velocity import velocity
from leapalign.engine.ledger import Ledger, resident_bytes
from leapalign.engine.memory.arena import HostArena
from leapalign.engine.model import StreamedModel
from leapalign.engine.streaming.gradients import Sink, accumulation
from leapalign.engine.streaming.partition import default_dtype
from leapalign.executors.streamed import streamed_rollout, streamed_vjps
from leapalign.method.last_steps import last_steps
from leapalign.method.trajectory import rollout

_CPU = torch.device("cpu")
_MMAP_THRESHOLD, _KEPT = -3, 2**15  # mallopt's option; larger blocks go back to the system when they are freed


# Imported once: every point's process begins as a copy of the one that has them. Torch imports dynamo when a dispatch
# mode first runs, diffusers a model when it is first named.
_PRELOADED = [__name__, "bench.__main__", "torch._dynamo", "diffusers.models.transformers"]


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
    context.set_forkserver_preload(_PRELOADED)
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
    found = live_bytes(workload, method)
    gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    before, ledger = resident_bytes(), Ledger("cpu")
    with ledger.phase("step"), closing(_Step(workload, method)) as step:
        step.run()
    most = ledger.phases["step"].host_bytes
    if before is not None and most is not None:
        found["resident_bytes"] = most - before
    return found


def live_bytes(workload: Workload, method: str) -> dict[str, int]:
    """peak_bytes and host_bytes of `measure`, in this process."""
    live = LiveTensors()
    with closing(_Step(workload, method)) as step, live:
        step.run(live)
    return {"peak_bytes": live.device.peak, "host_bytes": live.host.peak}


def allocated(workload: Workload, method: str, device: torch.device | None = None) -> dict[str, int]:
    """A point measured on the GPU, in this process.

    Args:
        device: None for the current GPU.

    Returns:
        peak_bytes: the most that torch's allocator gave out, workspaces of libraries among it; left out where the
            device was too small.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    gc.collect()  # what an earlier point left behind
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    try:
        with closing(_Step(workload, method, device, discard=True)) as step:
            torch.cuda.reset_peak_memory_stats(device)  # making the model is no part of it
            step.run()
            torch.cuda.synchronize(device)
            return {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    except torch.OutOfMemoryError:
        return {}


class _Step:
    """A model with its inputs, ready to roll out and to differentiate the last steps.

    Args:
        discard: the engine's weights are drawn on the device, a unit at a time, and its gradients kept nowhere: 48 GB
            of them would take long to fill.
    """

    def __init__(self, workload: Workload, method: str, device: torch.device = _CPU, *, discard: bool = False) -> None:
        self.workload, self.method = workload, method
        torch.manual_seed(SEED)
        home = _CPU if method in ENGINE else device  # the engine's latents are on the host
        with default_dtype(workload.dtype), torch.device("meta" if discard and method in ENGINE else home):
            transformer = make_transformer(workload).eval()
        conditioning = make_conditioning(workload, str(home))
        self.conditioning = {name: torch.randn_like(value) for name, value in conditioning.items()}
        self.noise, self.g = torch.randn(2, *latents_shape(workload), device=home)
        self.sigmas = torch.linspace(1, 0, workload.steps + 1, device=home)
        self.transformer: nn.Module = transformer
        if method in ENGINE:
            self.workload = engine_workload(workload, method)
            plan = replace(workload.plan, keep_block_inputs=self.workload.keep_block_inputs, kernels="torch")
            self.sink: Sink = _Discard() if discard else _HostGradients(transformer, accumulation(workload.dtype))
            if discard:
                _fill_buffers(transformer)
            self.transformer = _Watched(transformer, plan, device=device)
            if discard:
                from bench.speed.random_models import (
                    fill,  # not where processes are measured: it brings more than they need
                )

                fill(self.transformer.store, device)

    def close(self) -> None:
        if isinstance(self.transformer, StreamedModel):
            self.transformer.close()

    def run(self, live: LiveTensors | None = None) -> None:
        """Leave the gradients where the method leaves them: in the parameters, or in host memory."""
        workload, sigmas, given = self.workload, self.sigmas, (self.conditioning, self.noise, self.sigmas)
        first = workload.steps - workload.legs
        if isinstance(self.transformer, _Watched):
            self.transformer.live = live
            with nullcontext() if live is None else live.on_host():
                self._run_engine(self.transformer)
        elif self.method == "leapalign_one_graph":
            latents = rollout(self.transformer, *given).latents[-3:].clone()  # any pair costs the same
            run_graph(self.method, self.transformer, self.conditioning, latents, sigmas[-3:], self.g)
        else:
            latents = self.noise
            with torch.no_grad():
                for i in range(first):
                    v = velocity(self.transformer, latents, sigmas[i], self.conditioning)
                    latents = latents + (sigmas[i + 1] - sigmas[i]) * v
            run_graph(self.method, self.transformer, self.conditioning, latents[None], sigmas[first:], self.g)

    def _run_engine(self, model: StreamedModel) -> None:
        workload = self.workload
        steps = [list(range(workload.steps - workload.legs, workload.steps))] * workload.batch
        keep = workload.keep_block_inputs
        rolled = streamed_rollout(model, self.conditioning, self.noise, self.sigmas, steps, keep_block_inputs=keep)
        surrogate = last_steps(rolled.trajectory, workload.legs)
        streamed_vjps(model, self.conditioning, rolled, surrogate, self.g, mode=workload.mode, sink=self.sink)
        rolled.drop()


class _Watched(StreamedModel):
    """A streamed model that tells its own memory, the device's, from the latents around it, which stay on the host."""

    live: LiveTensors | None = None

    def hoist(self, *arguments: Any, **options: Any) -> Any:
        with self._device():
            return super().hoist(*arguments, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> Any:
        with self._device():
            return super().evaluate(*arguments, **options)

    def vjp(self, *arguments: Any, **options: Any) -> Any:
        with self._device():
            found = super().vjp(*arguments, **options)
        if self.live is not None:  # held factors: without a GPU their copy to the host is the tensor itself
            pairs = [pair for factors in self.sums.factors.values() for pair in factors]
            self.live.to_host(tensor for pair in pairs for tensor in pair)
        return found

    def _device(self) -> AbstractContextManager[None]:
        return nullcontext() if self.live is None else self.live.on_device()


def _fill_buffers(module: nn.Module) -> None:
    """Buffers of a module on meta become zeros on the host."""
    for name, buffer in list(module.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, torch.zeros_like(buffer, device=_CPU))


class _Discard:
    """A sink that keeps nothing, in the host's place."""

    on_host = True

    def __call__(self, unit: str, gradients: Mapping[str, Tensor | OuterProduct]) -> None:
        """Nothing is done with them."""


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
