"""The documentation: the site builds without a warning and loads nothing from elsewhere; commands and figures are true.

That its Python blocks run is seen to by test_readme.py. A block that starts with ```py needs what a test does not have
(several processes, a GPU) and is only compiled.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import http.server
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

import grades_hf
from benchmarks import compare
from benchmarks import page as benchmark_page
from grades_hf.config import helps
from grades_hf.tools import cli
from recipes import finetune, finetune_vlm
from tests.standin import PROJECT
from tests.test_readme import PAGES

DOCS = PROJECT / "docs"
# Elements that make a browser load something, with the attribute that says what.
LOADING = {
    "script": "src", "img": "src", "iframe": "src", "embed": "src", "source": "src", "audio": "src", "video": "src",
    "track": "src", "input": "src", "object": "data", "image": "href", "use": "href",
}  # fmt: skip
NOT_LOADED = {"canonical", "next", "prev", "alternate", "license", "author"}  # of <link rel=...>
ELSEWHERE = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
CSS = re.compile(r"(?:url\(\s*['\"]?|@import\s+(?:url\()?\s*['\"]?)((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
POLICY = "default-src 'self' 'unsafe-inline' data: blob:"


class Loads(HTMLParser):
    """What a page makes a browser load from another host, and the policy that forbids it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self.policy: str | None = None
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        asked = [values.get(LOADING[tag], "")] if tag in LOADING else []
        asked += [item.split()[0] for item in values.get("srcset", "").split(",") if item.strip()]
        if tag == "link" and not NOT_LOADED.intersection(values.get("rel", "").split()):
            asked.append(values.get("href", ""))
        if tag == "meta" and values.get("http-equiv") == "Content-Security-Policy" and not self.elsewhere:
            self.policy = values["content"]
        self.elsewhere += [address for address in asked if ELSEWHERE.match(address)]
        self.elsewhere += CSS.findall(values.get("style", ""))
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._style:
            self.elsewhere += CSS.findall(data)

    def handle_endtag(self, tag: str) -> None:
        self._style = False


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    """Where the site is served, on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_nothing_is_loaded_from_elsewhere(site):
    pages = sorted(site.glob("**/*.html"))
    assert len(pages) > 15
    for file in pages:
        loads = Loads(file.read_text(encoding="utf-8"))
        assert loads.elsewhere == [], file
        assert loads.policy == POLICY, file
    for file in site.glob("**/*.css"):
        assert CSS.findall(file.read_text(encoding="utf-8")) == [], file
    # The theme's script knows two libraries by address: for diagrams, of which there are none, and for browsers of 2019
    # and before. The policy keeps even these from being loaded.
    known = {"https://unpkg.com/mermaid@11/dist/mermaid.min.js", "https://unpkg.com/resize-observer-polyfill"}
    for file in site.glob("assets/javascripts/*.js"):
        assert set(re.findall(r"https?://(?:unpkg|cdn)[^\"'`]+", file.read_text(encoding="utf-8"))) <= known, file


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="https://example.org/badge.svg">',
        '<img src="a.png" srcset="a.png 1x, https://example.org/b.png 2x">',
        '<p style="background: url(https://example.org/a.png)">',
        "<style>@import 'https://example.org/a.css';</style>",
    ],
)
def test_what_is_loaded_from_elsewhere_is_seen(text):
    assert len(Loads(text).elsewhere) == 1
    assert Loads('<a href="https://example.org">x</a><img src="a.png"><link rel="canonical" href="https://x.y">')


def test_equations_and_docstrings_are_rendered(site):
    for name, least in (("concepts.html", 25), ("paper.html", 10), ("api.html", 10)):
        text = (site / name).read_text(encoding="utf-8")
        assert text.count("<math ") >= least, name
        assert "arithmatex" not in text, name
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in (f"grades_hf.{name}" for name in grades_hf.__all__):
        assert f'id="{name}"' in text, name
    for name, default, _ in helps():
        assert f"<code>{name}</code></td>\n<td><code>{default}</code>" in text, name


def test_every_page_leads_to_the_repository(site):
    """The address is that of setup.cfg; each page of docs/ can be edited there."""
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg", encoding="utf-8")
    address = setup["metadata"]["url"]
    for page in DOCS.glob("**/*.md"):
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        text = (site / f"{name}.html").read_text(encoding="utf-8")
        assert f'href="{address}/edit/main/docs/{name}.md"' in text, name
        assert f'href="{address}"' in text, name


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(url: str, folder: Path) -> tuple[str, list[str]]:
    """The page as the browser has rendered it, and what its console says."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={folder}", "--virtual-time-budget=3000", "--dump-dom", url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout, [line for line in run.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_in_a_browser(site, address, tmp_path):
    for name in ("index.html", "concepts.html", "api.html"):
        text, console = browse(f"{address}/{name}", tmp_path / "profile")
        assert console == [], name
        assert "md-search" in text
    # The console is read, and the policy holds: what a page asks for from elsewhere is not loaded.
    page = (site / "index.html").read_text(encoding="utf-8")
    (site / "elsewhere.html").write_text(page.replace("</body>", '<img src="http://example.invalid/a.png"></body>'))
    _, console = browse(f"{address}/elsewhere.html", tmp_path / "profile")
    (site / "elsewhere.html").unlink()
    assert any("Content Security Policy" in line for line in console)


@pytest.mark.slow
def test_the_search_finds_a_page(address, browser):
    page = browser.new_page()
    page.goto(f"{address}/index.html")
    page.click(".md-search__input")
    page.type(".md-search__input", "grace period")
    page.wait_for_selector('.md-search-result__link[href*="/concepts.html"]', state="attached", timeout=60_000)
    page.close()


SCRIPTS = {"finetune": finetune, "finetune_vlm": finetune_vlm, "compare": compare}

# --- commands ------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of every command in the ```bash blocks of a page."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [words for line in lines if (words := shlex.split(line, comments=True))]
    return found


def check_command(words: list[str]) -> None:
    """Refuse a command whose program, target, file or option does not exist.

    Raises:
        ValueError, SystemExit: something of it does not exist.
    """
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "grades-hf":
        cli._parser().parse_args(rest)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        if not rest or not set(rest) <= set(targets):
            raise ValueError(words)
    elif program == "pip" and rest[:3] == ["install", "-c", "constraints.txt"]:
        if rest[3:] not in (["torch"], ["-e", "."]):
            raise ValueError(words)
    elif program == "torchrun":
        if rest != ["--nproc_per_node", "2", "train.py"]:
            raise ValueError(words)
    elif program == "accelerate" and rest[0] == "launch":
        arguments = launch_command_parser().parse_args(rest[1:])
        check_script(arguments.training_script, arguments.training_script_args)
    elif program == "python" and rest[:2] == ["-m", "benchmarks.compare"]:
        check_script("benchmarks/compare.py", rest[2:])
    elif program == "python":
        check_script(rest[0], rest[1:])
    else:
        raise ValueError(f"{program} is unknown here; say how to check it.")


def check_script(file: str, arguments: list[str]) -> None:
    """The options of a recipe, of which `--help` knows, and its config file."""
    if not (PROJECT / file).is_file() or Path(file).stem not in SCRIPTS:
        raise ValueError(f"{file} is no recipe.")
    known = set(re.findall(r"--[\w-]+", help_of(Path(file).stem)))
    if Path(file).stem == "compare":
        known |= set(re.findall(r"--[\w-]+", help_of("finetune")))
    used = [word.split("=")[0] for word in arguments if word.startswith("--")]
    used += [part for word in arguments if " --" in word for part in word.split() if part.startswith("--")]
    unknown = set(used) - known
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    if unknown or (config is not None and not (PROJECT / config).is_file()):
        raise ValueError(f"{file}: {unknown or config}")


@functools.cache
def help_of(script: str) -> str:
    """What a recipe prints for `--help`."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", [script, "--help"]), pytest.raises(SystemExit):
        SCRIPTS[script].main()
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    for words in commands(page.read_text(encoding="utf-8")):
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "grades-hf suggest run --target 0.7 --nothing",
        "make nothing",
        "accelerate launch recipes/finetune.py --nothing",
        "python recipes/nothing.py",
        "python recipes/finetune.py --config recipes/configs/nothing.yaml",
        "python recipes/compare.py --arms 'patient=grades --nothing 2'",
    ],
)
def test_a_command_that_does_not_exist_is_seen(line):
    (words,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises((ValueError, SystemExit)):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_are_not_run_compile(page):
    for block in re.findall(r"^```py\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        compile(block, str(page), "exec")


# --- figures -------------------------------------------------------------------------------------------------------


def test_the_page_of_benchmarks_is_up_to_date():
    assert benchmark_page.PAGE.read_text(encoding="utf-8") == benchmark_page.render()


@pytest.mark.parametrize("page", ["method_card", "studies", "criteria"])
def test_the_figures_of_other_pages_are_measured(page):
    make = {"method_card": benchmark_page.figures, "studies": benchmark_page.studies, "criteria": benchmark_page.race}
    values = make[page]()
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert benchmark_page.fill(text, values) == text
    with pytest.raises(ValueError, match="no place for"):
        benchmark_page.fill("", values)


def rows(name: str) -> list[list[str]]:
    """The cells of all tables of a page."""
    lines = (DOCS / name).read_text(encoding="utf-8").splitlines()
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_configs_have_the_thresholds_of_the_paper_page():
    configs = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in finetune_configs()}
    listed = {}
    for cells in rows("paper.md"):
        names = re.findall(r"[\w.]+_(?:full|lora)", cells[-1])
        if len(names) == 2:
            listed |= {names[0]: float(cells[1]), names[1]: float(cells[2])}
        elif len(names) == 1:
            listed[names[0]] = {"vision": float(cells[3]), "language": float(cells[4])}
            assert configs[names[0]]["alpha"] == float(cells[2])
    assert len(listed) == 11
    for name, tau in listed.items():
        assert configs[name]["tau"] == tau, name
        assert "vlm" in name or configs[name]["alpha"] == 0.55


def test_the_configs_have_the_hyperparameters_of_the_paper_page():
    checked = 0
    for _, full, lora, source, key in (cells for cells in rows("paper.md") if len(cells) == 5):
        for method, value in (("full", full), ("lora", lora)):
            for file in finetune_configs():
                text = file.read_text(encoding="utf-8")
                of_method = f"use_peft: {str(method == 'lora').lower()} " in text
                if source != "Table 8" or not value or not of_method or f"\n{key}:" not in text:
                    continue
                own = yaml.safe_load(text)[key]
                number = float(value.removesuffix(" %")) / (100 if "%" in value else 1) if value != "cosine" else value
                assert own == pytest.approx(number) if isinstance(number, float) else own == number, (file, key)
                checked += 1
    assert checked > 60


def finetune_configs() -> list[Path]:
    """The configs that take their values from the paper."""
    files = sorted((PROJECT / "recipes" / "configs").glob("*.yaml"))
    return [file for file in files if "# Table" in file.read_text(encoding="utf-8")]
