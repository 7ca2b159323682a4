"""A hook of mkdocs: formulas (```math in Markdown, LaTeX) become MathML, which browsers draw without any script."""

from __future__ import annotations

from typing import Any


def on_config(config: Any) -> Any:
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _mathml})
    return config


def _mathml(source: str, *args: Any, **options: Any) -> str:
    from latex2mathml.converter import convert

    return f'<div class="formula">{convert(" ".join(source.split()), display="block")}</div>'
