"""A hub that cannot be reached is noticed at once, packages are pinned, and the cache is never half full."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from recipes import pypi


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if HF_HUB_OFFLINE were not set; nothing that a test switches off stays so."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    pypi.hub_reachable.cache_clear()
    yield
    pypi.hub_reachable.cache_clear()


def test_a_hub_that_refuses_is_noticed_at_once(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    assert not pypi.hub_reachable()
    assert time.monotonic() - started < 5
    assert huggingface_hub.is_offline_mode()


def test_a_hub_that_answers_is_used(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert pypi.hub_reachable()
    assert pypi.locate_model("someone/model") == "someone/model"
    server.shutdown()
    server.server_close()


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    pypi.hub_reachable.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not pypi.hub_reachable()
    pypi.hub_reachable.cache_clear()


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pypi.cache_dir() == tmp_path / "grades_hf"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert pypi.cache_dir() == Path.home() / ".cache" / "grades_hf"


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "thing"
    with pytest.raises(KeyError), pypi.made_once(target) as folder:
        (folder / "part").write_text("half", encoding="utf-8")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with pypi.made_once(target) as slow:
        (slow / "part").write_text("slow", encoding="utf-8")
        with pypi.made_once(target) as fast:
            (fast / "part").write_text("fast", encoding="utf-8")
    assert (target / "part").read_text(encoding="utf-8") == "fast"
    assert list(target.parent.iterdir()) == [target]


def _wheel(folder: Path) -> Path:
    file = folder / "tiny_rows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("tiny_rows/rows.txt", "one")
        archive.writestr("tiny_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-rows\nVersion: 1.0\n")
        archive.writestr("tiny_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_rows-1.0.dist-info/RECORD", "")
    return file


def test_pip_takes_only_the_pinned_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _wheel(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"pip could not get tiny-rows==1\.0(.|\n)*--model and --data_dir"):
        pypi.package("tiny-rows==1.0", "0" * 64)
    assert list((tmp_path / "cache" / "grades_hf" / "pypi").iterdir()) == []
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    folder = pypi.package("tiny-rows==1.0", digest)
    assert (folder / "tiny_rows" / "rows.txt").read_text(encoding="utf-8") == "one"
    file.unlink()
    assert pypi.package("tiny-rows==1.0", digest) == folder  # from the cache


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    pypi.hub_reachable.cache_clear()
    yield
    pypi.hub_reachable.cache_clear()


def test_a_model_that_is_nowhere_is_refused(offline: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='someone/model' is no local directory.*SmolLM2-135M-Instruct"):
        pypi.locate_model("someone/model")
    with pytest.raises(ValueError, match="is a directory without config.json"):
        pypi.locate_model(str(tmp_path))
    with pytest.raises(ValueError, match="is no directory"):
        pypi.locate_model(str(tmp_path / "none"))


def test_a_converted_model_is_taken_from_the_cache(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "grades_hf" / "models" / f"SmolLM2-135M-Instruct.Q4_1-{pypi.MODEL[1][:8]}"
    folder.mkdir(parents=True)
    assert pypi.locate_model(pypi.PACKAGED) == str(folder)
