"""What mkdocs.yml cannot say.

Equations become MathML while the site is built, some files lie outside of docs/, the table of options comes from the
code, and the address of the repository from setup.cfg.
"""

from __future__ import annotations

import configparser
import html
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# What pymdownx.arithmatex makes of $...$ and $$...$$, in pages and in docstrings.
EQUATION = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The links to the repository, and to edit a page there."""
    metadata = configparser.ConfigParser()
    metadata.read(Path(config.config_file_path).parent / "setup.cfg", encoding="utf-8")
    address = metadata["metadata"]["url"].rstrip("/")
    config.repo_url, config.edit_uri = address, "edit/main/docs/"
    config.repo_name = address.rpartition("/")[2]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Changelog and contributing guide are pages as well; figures of the studies lie beside their tables."""
    root = Path(config.config_file_path).parent
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, name.lower(), abs_src_path=str(root / name)))
    for path in sorted(root.glob("benchmarks/results/**/*.png")):
        name = path.relative_to(root / "benchmarks").as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(text: str, config: MkDocsConfig, **_: object) -> str:
    """Links that are right in the repository become links that are right in the site; the table of options."""
    text = text.replace("](../benchmarks/results/", "](results/")
    text = re.sub(r"\]\(docs/([\w/]+)\.md", r"](\1.md", text)  # of the changelog
    return (
        text.replace("<!-- options -->", options(Path(config.config_file_path).parent))
        if "<!-- options" in text
        else text
    )


def options(root: Path) -> str:
    """Name, default and meaning of every option, as a Markdown table."""
    sys.path.insert(0, str(root / "src"))
    try:
        from grades_hf.config import helps
    finally:
        sys.path.pop(0)
    rows = ["| option | default | |", "|---|---|---|"]
    for name, default, meaning in helps():
        safe = meaning.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
        rows.append(f"| `{name}` | `{default}` | {safe} |")
    return "\n".join(rows)


def on_page_content(content: str, **_: object) -> str:
    """Equations in MathML, which browsers render without a script."""
    return EQUATION.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[1] == "div" else "inline"
    found = convert(html.unescape(match[2]).strip(), display=display)
    # Bars are taken for stretchy operators with space around them.
    return re.sub(r"<mo>(&#x0007C;|&#x02016;)</mo>", r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', found)
