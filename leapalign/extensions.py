"""How the project's rooms find what they do not know: by a table of their own, `module:name`, or an entry point.

Each room that others may add to (families, rewards, executors, commands) has a table {name: "module:attribute"}. A
package outside adds to it by an entry point of the group `leapalign.<room>`, or its users write `module:attribute`.
Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from leapalign.errors import UsageError


def names(room: str, own: Mapping[str, str]) -> dict[str, str]:
    """{name: "module:attribute"} of a room: its own, then those of installed packages, which cannot replace them."""
    added = {point.name: point.value for point in metadata.entry_points(group=f"leapalign.{room}")}
    return {**own, **{name: place for name, place in added.items() if name not in own}}


def load(room: str, own: Mapping[str, str], name: str, *, key: str) -> Any:
    """The object that `name` stands for in a room, or that `name` = "module:attribute" says itself.

    Args:
        key: the setting that `name` is the value of, for messages.

    Raises:
        UsageError: no such name, module or attribute.
    """
    known = names(room, own)
    place = known.get(name, name)
    if name not in known and ":" not in name:
        raise UsageError(f"{key}={name!r}: choose one of {', '.join(known)}, or write module:name")
    module, _, attribute = place.partition(":")
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if attribute else found
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise  # the module is there, and misses something itself
        raise UsageError(f"{key}={name!r}: there is no module {module}; put its folder on PYTHONPATH") from None
    except AttributeError:
        raise UsageError(f"{key}={name!r}: {module} has no {attribute}; check the name behind the colon") from None
