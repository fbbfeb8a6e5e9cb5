"""The README.md of a finished run: what was aligned, how, with which result, and how to load it."""

from __future__ import annotations

from leapalign import __version__
from leapalign.config.keys import SECTIONS, AlignConfig, OutputKeys
from leapalign.families.protocol import Family


def model_card(config: AlignConfig, family: Family, *, name: str, results: str | None, skipped: int) -> str:
    """Markdown with the hub's header.

    Args:
        name: the run's name.
        results: the before/after table as text; None without validation prompts.
        skipped: steps that were left out because something was not finite.
    """
    base = config.pretrained_model_name_or_path
    header = [
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"tags: [leapalign, {family.name}, alignment]",
    ]
    if base.count("/") == 1 and not base.startswith((".", "/", "~")):
        header.append(f"base_model: {base}")
    weights = f"average of the weights (decay {config.ema_decay:g} a step)" if config.use_ema else "last weights"
    parts = [
        "\n".join([*header, "---"]),
        f"# {name}",
        f"The transformer of `{base}`, all parameters aligned with the reward `{config.reward}` by LeapAlign "
        f"(arXiv 2604.15311) over {config.max_train_steps} steps with leapalign {__version__}. "
        f"`transformer/` holds the {weights}.",
        f"```python\nfrom diffusers import {family.pipeline_class}, {family.transformer_class}\n\n"
        f'transformer = {family.transformer_class}.from_pretrained("transformer")\n'
        f'pipeline = {family.pipeline_class}.from_pretrained("{_loadable(base)}", transformer=transformer)\n```',
        "The run again:\n\n```\nleapalign align config.yaml --output_dir NEW_FOLDER\n```",
    ]
    if skipped:
        parts.append(f"{skipped} steps were skipped because a reward or a gradient was not finite (metrics.jsonl).")
    if results:
        parts.append(
            "## Results\n\nOn the validation prompts, from the same noise before and after; "
            f"± is the standard error over prompts.\n\n```\n{results}\n```\n\n"
            "![before and after](samples/before_after.png)"
        )
    rows = [
        f"| {key} | {_cell(getattr(config, key))} |"
        for section in SECTIONS
        if section is not OutputKeys
        for key in section.model_fields
    ]
    parts.append("\n".join(["## Settings\n\n| key | value |\n|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _loadable(base: str) -> str:
    return "leapalign/zoo/shapes/pipeline" if base == "shapes" else base


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
