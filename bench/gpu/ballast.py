"""Device memory held by another process, so that a cap is real: contexts, workspaces and gaps have to fit in, too.

`torch.cuda.set_per_process_memory_fraction` bounds what torch's allocator takes, and nothing else. Here a process of
its own takes all memory of the device but the cap, and ends with its standard input. Plain allocations: managed memory
can hang a GPU that has too little.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select

_SECONDS = 60  # for torch to be loaded and memory to be taken


@contextmanager
def ballast(leave: int) -> Iterator[dict[str, int]]:
    """Inside the block only `leave` bytes of the GPU are free. To be entered before this process has a CUDA context.

    Yields:
        {"taken", "left": bytes}, as the other process has found them.

    Raises:
        RuntimeError: it could not take them; the message says why.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "bench.gpu.ballast", str(leave)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            ready = select([process.stdout], [], [], _SECONDS)[0]
            line = process.stdout.readline() if ready else ""
            if not line:
                process.kill()
                told = process.stderr.read().strip().splitlines() or [f"nothing was told in {_SECONDS} s"]
                raise RuntimeError(f"no ballast: {told[-1]}")
            found: dict[str, int] = json.loads(line)
            yield found
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def main(leave: int) -> int:
    """Take memory until `leave` bytes are free, tell it, and hold it until standard input ends."""
    import torch

    torch.cuda.init()
    free = torch.cuda.mem_get_info()[0]  # this process's context is not in it any more
    if free < leave:
        print(f"{free} bytes of the device are free, fewer than the {leave} to be left", file=sys.stderr)
        return 1
    held = torch.empty(free - leave, dtype=torch.uint8, device="cuda")
    left = torch.cuda.mem_get_info()[0]
    print(json.dumps({"taken": held.numel(), "left": left}), flush=True)
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
