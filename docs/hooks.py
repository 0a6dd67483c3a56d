"""What mkdocs.yml cannot say: equations become MathML while the site is built, and some files lie outside of docs/."""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# What pymdownx.arithmatex makes of $...$ and $$...$$, in pages and in docstrings.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Changelog and contributing guide are pages as well; figures of the studies lie beside their tables."""
    root = Path(config.config_file_path).parent
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, name.lower(), abs_src_path=str(root / name)))
    for path in sorted(root.glob("benchmarks/results/**/*.png")):
        name = path.relative_to(root / "benchmarks").as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, **_: object) -> str:
    """Links that are right in the repository become links that are right in the site."""
    return text.replace("](../benchmarks/results/", "](results/")


def on_page_content(content: str, **_: object) -> str:
    """Equations in MathML, which browsers render without a script."""
    return EQUATION.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    found = convert(html.unescape(match[2]).strip(), display=display)
    # Bars are taken for stretchy operators with space around them.
    return re.sub(r"<mo>(&#x0007C;|&#x02016;)</mo>", r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', found)
