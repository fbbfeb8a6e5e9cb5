"""Model families, one file each: latents, guidance, noise levels, prompts, position ids, published shapes.

No other room names a model family; they ask the object that `of_pipeline` or `of_transformer` gives.
"""

from __future__ import annotations

from typing import Any

from leapalign import extensions
from leapalign.families.protocol import Family, Shapes

# name -> its one object
FAMILIES = {"flux": "leapalign.families.flux:family", "sd3": "leapalign.families.sd3:family"}


def every() -> list[Shapes]:
    """All families, those of installed packages too."""
    return [
        extensions.load("families", FAMILIES, name, key="family") for name in extensions.names("families", FAMILIES)
    ]


def trained() -> list[Family]:
    """Those that `leapalign align` trains."""
    return [each for each in every() if isinstance(each, Family)]


def of_pipeline(pipeline_class: str | None) -> Family | None:
    """The family whose pipelines have this `_class_name` in model_index.json; None if nothing trains them.

    Without a class name it is the first one, which is FLUX.
    """
    return next((each for each in trained() if pipeline_class in (None, each.pipeline_class)), None)


def of_transformer(config: Any) -> Shapes | None:
    """The family of a transformer/config.json; without a class name in it the first one, which is FLUX."""
    name = config.get("_class_name")
    return next((each for each in every() if name in (None, each.transformer_class)), None)
