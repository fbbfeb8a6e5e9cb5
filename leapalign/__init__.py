"""Full-parameter reward-gradient alignment of flow-matching image models (LeapAlign, arXiv 2604.15311).

The public names load torch when they are first used: a mistake on the command line is answered without it.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leapalign.gradients import alignment_gradients
    from leapalign.method.leapalign import LeapAlign
    from leapalign.method.task import GradientResult

__all__ = ["GradientResult", "LeapAlign", "alignment_gradients"]

_HOMES = {
    "GradientResult": "leapalign.method.task",
    "LeapAlign": "leapalign.method.leapalign",
    "alignment_gradients": "leapalign.gradients",
}

try:
    __version__ = metadata.version("leapalign")
except metadata.PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
