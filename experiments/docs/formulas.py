"""A hook of mkdocs: formulas (```math in Markdown, LaTeX) become MathML, which browsers draw without any script.

Links to files of the repository outside docs/, which a site does not have, become the names of the files.
"""

from __future__ import annotations

import re
from typing import Any


def on_config(config: Any) -> Any:
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _mathml})
    return config


def on_page_markdown(markdown: str, **options: Any) -> str:
    return re.sub(r"\[`([^\]`]+)`\]\(\.\./((?:src|examples)/[^)\s]+)\)", _named, markdown)


def _named(link: re.Match[str]) -> str:
    return f"`{link[2]}`" if link[2].endswith(link[1]) else f"`{link[1]}` in `{link[2]}`"


def _mathml(source: str, *args: Any, **options: Any) -> str:
    from latex2mathml.converter import convert

    return f'<div class="formula">{convert(" ".join(source.split()), display="block")}</div>'
