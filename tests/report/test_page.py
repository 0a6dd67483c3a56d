"""The HTML report: what it says of a run, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from grades_hf import History
from grades_hf.report import page
from grades_hf.report.runs import load_runs
from grades_hf.tools import cli

from .histories import PROJECTIONS, changed, history, look, looked

STRANGE = "<script>alert('x')</script>\"]+alert(1)+[\"{{data}}</script>"
CELLS = '[aria-roledescription="rect mark"]'
TOOLTIP = "#vg-tooltip-element"


@pytest.fixture(scope="module", autouse=True)
def bundle_once() -> Iterator[None]:
    """Vega's script takes seconds to make; it is the same for every page."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", lambda snippet: script)
        yield


def logged(run: History, **more: Any) -> History:
    run.logs = [
        {"step": step, "seconds": step * 0.5, "frozen": 0, "loss": 3 - step / 20, "compute_saved": 0.1}
        for step in range(5, 21, 5)
    ]
    run.savings = {
        "steps": 20, "full": 200.0, "used": 180.0, "weight_gradient": 20.0, "input_gradient": 0.0, "adapter": 0.0,
        "planned": 240.0,
    }  # fmt: skip
    for name, value in more.items():
        setattr(run, name, value)
    return run


def folder(at: Path, run: History | None = None, results: dict[str, Any] | None = None) -> Path:
    at.mkdir(parents=True)
    if run is not None:
        run.save(at / "grades_history.json")
    if results is not None:
        (at / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return at


def results(loss: float, used: float = 6.0) -> dict[str, Any]:
    return {
        "steps_run": 20, "steps_planned": 24, "compute": {"used": used, "full": 10.0, "saved": 1 - used / 10},
        "seconds": {"training": 7.0}, "evaluation": {"task": "boolq", "rows": 5, "after": {"loss": loss}}, "seed": 1,
    }  # fmt: skip


def report(*folders: Path) -> str:
    return page.to_html(load_runs(folders))


# --- what it says ------------------------------------------------------------------------------------------------


def test_the_figures_of_a_run_are_those_that_were_recorded(tmp_path: Path) -> None:
    run = history(layers=2, projections=("q", "up"), frozen=0.0)
    run.events = [{"step": s, "name": f"None.{s % 2}.q.0", "value": 0.1234567, "tau": 1.0} for s in (13, 16)]
    text = report(folder(tmp_path / "run", logged(run, ended="stopped")))
    assert "2 of 4<small>between steps 13 and 16" in text
    assert "25.0%<small>of the planned FLOPs, counted" in text  # 180 of 240
    assert "10 s<small>wall clock" in text
    assert "still going on" not in text
    row = re.search(r'<tr><th scope="row">None.1.q.0</th>(.*?)</tr>', text)
    assert row is not None
    assert re.findall(r">([^<]*)</td>", row[1]) == ["attention", "1", "10", "step 13", "0.1235", "1"]


def test_a_run_that_goes_on_is_told_from_one_that_ended(tmp_path: Path) -> None:
    text = report(folder(tmp_path / "run", logged(history())))
    assert "still going on, or was interrupted" in text
    assert "10.0%<small>of the FLOPs so far, counted" in text  # 180 of 200: what is to come saves nothing yet


def test_what_an_older_history_lacks_is_said_and_not_made_up(tmp_path: Path) -> None:
    text = report(folder(tmp_path / "run", history()))
    assert "Step time and loss: not recorded" in text
    assert "<dt>compute saved</dt><dd>not counted" in text
    assert "<dt>training time</dt><dd>not recorded" in text


def test_the_model_is_named_where_a_file_names_it(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", history())
    assert load_runs([run])[0].model is None
    (run / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}', encoding="utf-8")
    assert "<strong>some/model</strong>" in report(run)


def test_the_page_of_a_run_without_a_tau_explains_its_end(tmp_path: Path) -> None:
    text = report(folder(tmp_path / "run", looked()))
    assert "Ended by a look at step 20 of 40" in text
    assert "<dt>looks at held-out rows</dt><dd>2<small>the last one ended the run" in text
    assert "<dt>held-out loss</dt><dd>2.4000<small>at the last look; 2.6000 without averaging" in text
    assert re.findall(r">([^<]*)</td>", text.split('<th scope="row">12</th>')[1].split("</tr>")[0])[-1] == "go on"
    names = re.findall(r'<figure class="(\w+)"', text)
    assert names == ["votes", "looks", "statistic", "loss", "step_time"], "and no map of what froze"
    going = report(folder(tmp_path / "going", looked(None)))
    assert "<dd>0<small>none so far" in going
    assert "When each matrix froze" not in going


def test_the_error_of_a_look_at_one_row_is_left_out(tmp_path: Path) -> None:
    run = looked()
    run.looks = [look(12, 2.5, 2.4, False, error=float("inf"))]
    from grades_hf.report.runs import Run

    assert "-0.1000<" in page.to_html([Run(tmp_path, "run", run, {})])


def test_a_last_look_that_only_computed_the_loss_of_the_average(tmp_path: Path) -> None:
    run = looked()
    run.looks = [{**look(12, 2.5, 2.4, False), "loss": None, "difference": None, "error": None}]
    from grades_hf.report.runs import Run

    assert "2.4000<small>at the last look</small>" in page.to_html([Run(tmp_path, "run", run, {})])


def test_a_grid_of_runs_is_a_page(tmp_path: Path) -> None:
    for arm, seed, loss in (("none", 1, 3.0), ("none", 2, 3.2), ("grades", 1, 3.1), ("grades", 2, 3.1)):
        run = history() if arm == "grades" else None
        folder(tmp_path / "grid" / "boolq" / arm / f"seed-{seed}", run, results(loss))
    folder(tmp_path / "grid" / "boolq" / "none" / "seed-3", None, {"evaluation": {}})  # has not ended
    runs = load_runs([tmp_path / "grid"])
    assert [run.label for run in runs] == ["grades/seed-1", "grades/seed-2", "none/seed-1", "none/seed-2"]
    text = page.to_html(runs)
    assert "3.2000 loss" in text
    assert "no GradES" in text


def trainer_state(at: Path, steps: int = 30, name: str = "trainer_state.json") -> Path:
    at.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"step": t, "loss": 3 - t / 30} for t in range(10, steps + 1, 10)]
    rows += [{"step": steps, "eval_loss": 2.5}, {"step": steps, "train_runtime": 12.0}, {"loss": 1.0}, "no row"]
    (at / name).parent.mkdir(exist_ok=True)
    state = {"log_history": rows, "max_steps": 40, "global_step": steps}
    (at / name).write_text(json.dumps(state), encoding="utf-8")
    return at


def test_losses_of_runs_of_any_trainer_are_overlaid(tmp_path: Path) -> None:
    plain = trainer_state(tmp_path / "plain")
    trainer_state(tmp_path / "plain", 20, "checkpoint-20/trainer_state.json")  # an older one
    ours = trainer_state(folder(tmp_path / "ours", looked()), 20)
    runs = load_runs([ours, plain])
    assert runs[1].losses == [(10, pytest.approx(2.667, abs=1e-3)), (20, pytest.approx(2.333, abs=1e-3)), (30, 2.0)]
    assert (runs[1].steps, runs[1].held_out, runs[1].seconds) == ((30, 40), [(30, 2.5)], 12.0)
    text = page.to_html(runs)
    assert re.findall(r'<figure class="(\w+)"', text)[:2] == ["held_out", "losses"]
    assert re.search(r">plain</th>.*?30 of 40<.*?no GradES<.*?2.0000<.*?2.5000<.*?12 s<", text)
    names = {file.name for file in page.write_plots(runs, tmp_path / "plots", "svg")}
    assert {"losses.svg", "held_out.svg", "ours-votes.svg"} <= names
    with pytest.raises(ValueError, match="holds no record of GradES"):
        load_runs([plain])


def test_runs_without_results_are_compared_by_what_there_is(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", logged(history(), ended="stopped"))
    b = folder(tmp_path / "b", history())
    text = report(a, b)
    assert re.search(r">a</th>.*?20 of 24<.*?25.0%<.*?2.0000<.*?10 s<", text)
    assert re.search(r">b</th>.*?20 of 24, not ended<.*?not counted<.*?not recorded<.*?not recorded<", text)
    assert "held-out loss" not in text, "no run has any"


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_the_command_writes_page_and_plots(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = folder(tmp_path / "run", logged(history()))
    output = tmp_path / "page.html"
    assert cli.main(["report", str(run), "-o", str(output), "--plots", str(tmp_path / "p"), "--format", ending]) == 0
    names = {f"{name}.{ending}" for name in ("freezing_map", "statistic", "frozen", "step_time", "loss")}
    assert {file.name for file in (tmp_path / "p").iterdir()} == names
    begins = {"svg": b"<svg", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert all(file.read_bytes().startswith(begins) for file in (tmp_path / "p").iterdir())
    assert capsys.readouterr().out.splitlines()[0] == str(output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "holds no record of GradES"),
        (lambda path: None, "holds no record of GradES"),
        (lambda path: folder(path, None, results(1.0)), "holds no record of GradES"),
        (lambda path: (path.mkdir(), (path / "grades_history.json").write_text("{")), "is damaged"),
        (lambda path: (folder(path, history()), (path / "results.json").write_text("{")), "is damaged"),
    ],
)
def test_bad_input_ends_the_command(
    make: Callable[[Path], Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run")
    with pytest.raises(SystemExit) as refused:
        cli.main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")])
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "run" in error
    assert not (tmp_path / "page.html").exists()


def test_a_run_is_named_once_and_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", history())
    with pytest.raises(ValueError, match="names a run twice"):
        load_runs([run, run])
    with pytest.raises(SystemExit):
        cli.main(["report", str(run), "-o", str(tmp_path / "nowhere" / "page.html")])


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`show(folders, **options)`: the report on them in a new window, every chart drawn; errors fail the test."""
    contexts, problems = [], []

    def make(folders: Sequence[Path], **options: Any) -> Any:
        file = tmp_path / f"report-{len(contexts)}.html"
        file.write_text(report(*folders), encoding="utf-8")
        contexts.append(browser.new_context(**options))
        window = contexts[-1].new_page()
        window.on("console", lambda message: problems.append(message.text))
        window.on("pageerror", lambda error: problems.append(str(error)))
        window.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        window.on("request", lambda request: request.url == file.as_uri() or problems.append(request.url))
        window.goto(file.as_uri())
        drawn(window)
        return window

    yield make
    for context in contexts:
        context.close()
    assert [problem for problem in problems if not problem.startswith(("blob:", "data:"))] == []


def drawn(window: Any, scheme: str = "") -> None:
    value = f'="{scheme}"' if scheme else ""
    window.wait_for_function(
        f"""() => [...document.querySelectorAll('figure')].filter((f) => !f.closest('details:not([open])'))
        .every((f) => f.matches('[data-drawn{value}]'))"""
    )


def big(tmp_path: Path) -> Path:
    return folder(tmp_path / "run", logged(history(layers=30, frozen=0.8), ended="stopped"))


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 30, "frozen": 0.8},
        {"layers": 2, "experts": 12},
        {"layers": 3, "towers": ("vision", "language"), "outside": True},
        {"layers": 80, "frozen": 1.0},
        {"projections": (*PROJECTIONS, *(f"kind_{number}" for number in range(23)))},
    ],
)
def test_the_map_has_a_cell_for_each_component(shape: dict[str, Any], show: Any, tmp_path: Path) -> None:
    run = history(**shape)
    window = show([folder(tmp_path / "run", logged(run))])
    cells = window.locator(f".freezing_map {CELLS}")
    assert cells.count() == len(run.components)
    about = cells.evaluate_all("(all) => all.map((cell) => cell.getAttribute('aria-label').split(':')[0])")
    assert sorted(about) == sorted(component["name"] for component in run.components)
    boxes = cells.evaluate_all(
        "(all) => all.map((c) => { const b = c.getBoundingClientRect(); return [b.left, b.top, b.width, b.height] })"
    )
    assert len({(left, top) for left, top, _, _ in boxes}) == len(boxes)  # each in a place of its own
    assert min(min(width, height) for _, _, width, height in boxes) >= 3


def test_mouse_and_keyboard_show_the_same(show: Any, tmp_path: Path) -> None:
    window = show([big(tmp_path)])
    row = {"name": "None.0.k.0", "parameters": "10", "tau": "1"}
    cell = window.locator(f'{CELLS}[aria-label^="{row["name"]}:"]')
    cell.hover()
    window.locator(TOOLTIP).wait_for(state="visible")
    hovered = window.locator(TOOLTIP).inner_text()
    assert [line for line in hovered.split() if line in ("matrix", "parameters", "value", "τ")]
    label = cell.get_attribute("aria-label")
    value = re.search(r"value (\S+),", label)
    assert value is not None
    assert {*row.values(), value[1]} <= set(hovered.split())

    window.mouse.move(0, 0)
    window.locator(TOOLTIP).wait_for(state="hidden")
    assert window.locator(f'{CELLS}[tabindex="0"]').count() == 1
    window.locator(f'{CELLS}[tabindex="0"]').focus()
    focused = "document.activeElement.getAttribute('aria-label').split(':')[0]"
    while window.evaluate(focused) != "None.0.q.0":  # the lowest layer, then its first column
        before = window.evaluate(focused)
        window.keyboard.press("ArrowDown")
        if window.evaluate(focused) == before:
            window.keyboard.press("ArrowLeft")
            assert window.evaluate(focused) != before
    window.keyboard.press("ArrowRight")
    assert window.evaluate(focused) == row["name"]
    window.locator(TOOLTIP).wait_for(state="visible")
    assert window.locator(TOOLTIP).inner_text() == hovered
    assert window.locator(f'{CELLS}[tabindex="0"]').count() == 1
    window.keyboard.press("Escape")
    window.locator(TOOLTIP).wait_for(state="hidden")


def test_the_dark_scheme_is_followed_while_the_page_is_open(show: Any, tmp_path: Path) -> None:
    def colors(window: Any) -> tuple[str, str]:
        body = window.evaluate("getComputedStyle(document.body).backgroundColor")
        return body, window.locator(".freezing_map svg text").first.get_attribute("fill")

    window = show([big(tmp_path)], color_scheme="dark")
    dark = colors(window)
    window.emulate_media(color_scheme="light")
    drawn(window, "light")
    light = colors(window)
    assert dark[0] == "rgb(21, 25, 30)"
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[1] != light[1]
    assert window.locator(f".freezing_map {CELLS}").count() == 210


def test_a_phone_needs_no_sideways_scrolling(show: Any, tmp_path: Path) -> None:
    folders = [big(tmp_path), folder(tmp_path / ("long-name-" * 12), history(towers=("vision", "language")))]
    folders.append(folder(tmp_path / "looked", looked()))
    for shown in (folders[:1], folders[1:2], folders[2:], folders):
        window = show(shown, viewport={"width": 390, "height": 844})
        window.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
        drawn(window)
        assert window.evaluate("document.documentElement.scrollWidth") == 390
        assert window.locator(".chart svg").evaluate_all(
            "(all) => all.every((svg) => svg.getBoundingClientRect().right <= 390)"
        )


def test_the_buttons_save_files(show: Any, tmp_path: Path) -> None:
    window = show([big(tmp_path)], color_scheme="dark", accept_downloads=True)
    for name in ("freezing_map", "statistic", "frozen", "step_time", "loss"):
        for form, begins in (("svg", b"<svg"), ("png", b"\x89PNG")):
            with window.expect_download() as waiting:
                window.locator(f'figure.{name} [data-format="{form}"]').click()
            assert waiting.value.suggested_filename == f"{name}.{form}"
            waiting.value.save_as(tmp_path / f"{name}.{form}")
            content = (tmp_path / f"{name}.{form}").read_bytes()
            assert content.startswith(begins)
            assert form == "png" or b"#FFFFFF" in content  # light, for print


def test_several_runs_are_a_table_a_plot_and_a_section_each(show: Any, tmp_path: Path) -> None:
    folders = [
        folder(tmp_path / name, logged(history()), results(3.0, used)) for name, used in (("a", 5.0), ("b", 6.0))
    ]
    window = show(folders)
    assert window.locator("figure.losses .mark-line.role-mark path").count() == 2
    assert window.locator("figure.freezing_map svg").count() == 0
    window.locator("details.run > summary").first.click()
    drawn(window)
    assert window.locator(f"details.run[open] .freezing_map {CELLS}").count() == 21


def test_strange_names_do_no_harm(show: Any, tmp_path: Path) -> None:
    run = history(layers=1, projections=("q",), frozen=1.0)
    (component,), (event,) = run.components, run.events
    run = changed(
        run,
        components=[{**component, "name": STRANGE, "group": STRANGE, "projection": STRANGE}],
        values={STRANGE: run.values[component["name"]]},
        events=[{**event, "name": STRANGE}],
        config={"tau": {STRANGE: 1.0}},
    )
    at = folder(tmp_path / "<b>&'\"", run, {**results(1.0), "sources": {"model": STRANGE}})
    other = folder(tmp_path / "other", history(), {**results(1.0), "sources": {"model": "m"}})
    for folders in ([at], [at, other]):
        window = show(folders)
        window.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true })")
        drawn(window)
        assert window.locator("body script:not([type])").count() == 2
        assert window.locator(f".table th:text-is({json.dumps(STRANGE)})").count() == 2  # its group, itself
    window.locator(f".freezing_map {CELLS}").first.hover()
    window.locator(TOOLTIP).wait_for(state="visible")
    assert STRANGE in window.locator(TOOLTIP).inner_text()
    assert window.locator(f"{TOOLTIP} script").count() == 0
