"""Host memory of exactly the size that is asked for, page-locked where there is a GPU.

torch's pinned allocator rounds every block up to a power of two, so that 33 GiB of weights would take 64; and it keeps
what it once had. Here one anonymous mapping holds all regions of a store, and it is locked in one call.
"""

from __future__ import annotations

import mmap
import resource
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor

PAGE = 4096  # bytes: a region starts at a multiple, as direct I/O and page locking like it
_PORTABLE = 1  # cudaHostRegisterPortable: locked for every GPU of the process, not only the current one


class HostArena(Mapping[str, Tensor]):
    """{region: 1-D uint8 tensor} over one anonymous mapping of the host's memory.

    The memory is zero and takes no place before it is first touched, unless it is pinned: locking touches all of it.
    Every region is a storage of its own, so that the regions' version counters are independent. A region stays valid
    as long as somebody holds it or a view of it, whatever becomes of the arena.

    Args:
        sizes: {region: bytes}, exact; zero is allowed.
        pin: lock the pages with cudaHostRegister, so that copies to and from a GPU run beside the host at full
            speed. None: if this torch has a GPU.

    Attributes:
        nbytes: bytes of the mapping: the sum of the sizes, each rounded up to 4096.
        pinned: whether the pages are locked now.

    Raises:
        ValueError: pin=True without a GPU.
        MemoryError: the host refuses so large a mapping.
        RuntimeError: the pages cannot be locked.
    """

    def __init__(self, sizes: Mapping[str, int], *, pin: bool | None = None) -> None:
        if pin and not torch.cuda.is_available():
            raise ValueError("pin = True, but this torch has no GPU to lock pages for; leave pin out")
        starts: dict[str, int] = {}
        self.nbytes = 0
        for name, size in sizes.items():
            assert size >= 0, f"region {name} of {size} bytes"
            starts[name] = self.nbytes
            self.nbytes += -(-size // PAGE) * PAGE
        memory = _map(self.nbytes) if self.nbytes else None
        self._regions: dict[str, Tensor] = {}
        self._memory: mmap.mmap | None = memory
        self._unpin: weakref.finalize | None = None
        for name, size in sizes.items():
            if memory is None or size == 0:  # torch.frombuffer takes no empty buffer
                self._regions[name] = torch.empty(0, dtype=torch.uint8)
            else:
                self._regions[name] = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=starts[name])
        if torch.cuda.is_available() if pin is None else pin:
            self.lock()

    def lock(self) -> None:
        """Lock the pages now; for memory that is filled first, so that it takes no place before. Errors: the class."""
        if self._memory is not None and not self.pinned:
            address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
            _register(address, self.nbytes)
            # It holds the mapping: a page must not be unmapped while it is locked.
            self._unpin = weakref.finalize(self, _unregister, address, self._memory)

    @property
    def pinned(self) -> bool:
        return self._unpin is not None and self._unpin.alive

    def __getitem__(self, name: str) -> Tensor:
        return self._regions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def __len__(self) -> int:
        return len(self._regions)

    def close(self) -> None:
        """Unlock the pages and forget the regions; the memory goes back once nobody holds a view of it.

        Copies still under way are waited for. A second call does nothing; garbage collection and the end of the
        process do the same.
        """
        self._regions, self._memory = {}, None
        if self._unpin is not None:
            self._unpin()


def _map(nbytes: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"the host has no room for {nbytes / 2**30:.1f} GiB of weights and states ({error.strerror}); "
            "use a smaller dtype, fewer states (EMA, held gradients), or a host with more memory"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):  # 512 times fewer page faults and entries to lock
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _register(address: int, nbytes: int) -> None:
    status = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    if status != 0:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        allowed = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} bytes"
        raise RuntimeError(
            f"cannot lock {nbytes} bytes of host memory (cudaHostRegister: error {status}); ulimit -l is {allowed}: "
            "raise it, free host memory, or pass pin=False for slower copies"
        )


def _unregister(address: int, memory: mmap.mmap) -> None:
    torch.cuda.synchronize()  # a copy under way still reads the pages
    status = int(torch.cuda.cudart().cudaHostUnregister(address))
    assert status == 0, f"cudaHostUnregister: error {status}"
