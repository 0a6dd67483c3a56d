"""What setup.cfg cannot say: links of the project derived from its one address, and a README that renders elsewhere."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def address() -> str:
    """Where the project lives: `url` in setup.cfg, the one place that names it."""
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg", encoding="utf-8")
    return metadata["metadata"]["url"].rstrip("/")


def readme() -> str:
    """README.md with links and pictures that are right outside of the repository, too."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:|#)([^)]+\))", rf"\1{address()}/raw/main/\2", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#)([^)]+\))", rf"\1{address()}/blob/main/\2", text)


if __name__ == "__main__":
    setup(
        long_description=readme(),
        long_description_content_type="text/markdown",
        project_urls={
            "Source": address(),
            "Documentation": f"{address()}/blob/main/docs/index.md",
            "Changelog": f"{address()}/blob/main/CHANGELOG.md",
            "Issues": f"{address()}/issues",
        },
    )
