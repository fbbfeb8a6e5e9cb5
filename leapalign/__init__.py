"""Full-parameter reward-gradient alignment of flow-matching image models (LeapAlign, arXiv 2604.15311).

The public names load torch when they are first used: a mistake on the command line is answered without it.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leapalign.engine.backbones.sequential import SequentialBackbone
    from leapalign.engine.model import StreamedModel
    from leapalign.engine.optimizer.adamw8bit import AdamW8bit
    from leapalign.engine.planning.planner import plan_memory
    from leapalign.engine.planning.workload import Budget, Workload
    from leapalign.gradients import alignment_gradients
    from leapalign.method.leapalign import LeapAlign
    from leapalign.method.task import GradientResult

__all__ = [
    "AdamW8bit",
    "Budget",
    "GradientResult",
    "LeapAlign",
    "SequentialBackbone",
    "StreamedModel",
    "Workload",
    "alignment_gradients",
    "plan_memory",
]

_HOMES = {
    "AdamW8bit": "leapalign.engine.optimizer.adamw8bit",
    "Budget": "leapalign.engine.planning.workload",
    "GradientResult": "leapalign.method.task",
    "LeapAlign": "leapalign.method.leapalign",
    "SequentialBackbone": "leapalign.engine.backbones.sequential",
    "StreamedModel": "leapalign.engine.model",
    "Workload": "leapalign.engine.planning.workload",
    "alignment_gradients": "leapalign.gradients",
    "plan_memory": "leapalign.engine.planning.planner",
}

try:
    __version__ = metadata.version("leapalign")
except metadata.PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
