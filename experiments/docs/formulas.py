"""A hook of mkdocs: formulas (```math in Markdown, LaTeX) become MathML, which browsers draw without any script.

Links to files of the repository outside docs/, which a site does not have, become the names of the files; pictures of
experiments/ that a page shows are put into the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PICTURE = re.compile(r"\]\(\.\./(experiments/[^)\s]+\.svg)\)")


def on_config(config: Any) -> Any:
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": _mathml})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page in Path(config["docs_dir"]).glob("*.md"):
        for name in _PICTURE.findall(page.read_text()):
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **options: Any) -> str:
    markdown = _PICTURE.sub(r"](\1)", markdown)
    return re.sub(r"\[`([^\]`]+)`\]\(\.\./((?:src|examples)/[^)\s]+)\)", _named, markdown)


def on_page_content(html: str, *, page: Any, **options: Any) -> str:
    """Mark the tables of options, whose rows become blocks on a phone."""
    return f'<div class="options">{html}</div>' if page.file.src_uri == "configuration.md" else html


def _named(link: re.Match[str]) -> str:
    return f"`{link[2]}`" if link[2].endswith(link[1]) else f"`{link[1]}` in `{link[2]}`"


def _mathml(source: str, *args: Any, **options: Any) -> str:
    from latex2mathml.converter import convert

    return f'<div class="formula">{convert(" ".join(source.split()), display="block")}</div>'
