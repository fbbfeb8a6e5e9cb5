"""LeapAlign: alignment of all parameters of a flow transformer with a differentiable reward, on one GPU."""

from importlib import metadata

from leapalign.alignment import GradientResult, alignment_gradients
from leapalign.surrogates import LeapAlign

try:
    __version__ = metadata.version("leapalign")
except metadata.PackageNotFoundError:  # a checkout that is on the path but not installed
    __version__ = "0+checkout"

__all__ = ["GradientResult", "LeapAlign", "__version__", "alignment_gradients"]
