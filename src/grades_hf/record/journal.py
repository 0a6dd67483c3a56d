"""The file of a record: what is appended to it when, and how it is read."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import schema
from .storage import Rows
from .stream import File

if TYPE_CHECKING:
    from .history import History

logger = logging.getLogger(__name__)

FILE_NAME = "grades_history.arrow"
FORMAT = 2  # 1 is the JSON file
SELDOM = 5.0  # seconds between two writes that are not urgent


class Journal:
    """Keeps the file of a history as the history is, by appending the difference.

    Attributes:
        file: The file that is appended to; None before `open`.
        written: What the file says of the frame.
    """

    def __init__(self) -> None:
        self.file: File | None = None
        self.written: dict[str, Any] = {}
        self._seen: dict[str, list[Any]] = {}  # the lists that were written; only their last items can have changed
        self._last_write, self._failed = 0.0, False

    def open(self, history: History, path: Path) -> None:
        """See `History.open`."""
        try:
            self._open(history, path)
        except OSError as error:
            self.file = None
            if error.filename is not None:  # the system's message names the file
                raise
            raise OSError(
                error.errno, f"GradES cannot write its record, so the run does not begin: {error.strerror}", str(path)
            ) from error

    def _open(self, history: History, path: Path) -> None:
        rows = history._rows
        if rows.file is None or not rows.file.is_at(path):
            self.create(history, path, keep=True)
            return
        if rows.stale:
            try:
                self.create(history, path, keep=True)
                return
            except OSError:  # no room for a second file: this one is told what does not count
                pass
        rows.file.writable()
        self.file = rows.file
        self.append(history, always=True)  # a full disk is known before the first step

    def flush(self, history: History, *, urgent: bool) -> bool:
        """See `History.flush`."""
        now = time.monotonic()
        if self.file is None or (not urgent and now - self._last_write < SELDOM):
            return True
        try:
            self.append(history, durable=urgent)
        except OSError as error:
            if not self._failed:
                logger.warning("GradES: %s could not be written, training goes on: %s", self.file.path, error)
            self._failed, self._last_write = True, now
            return False
        self._failed, self._last_write = False, now
        return True

    def append(self, history: History, *, durable: bool = True, always: bool = False) -> None:
        """Add what the file does not say yet, or with `always` at least an empty note; a deleted file is written anew.

        Raises:
            OSError: it cannot be written.
        """
        assert self.file is not None
        if not os.path.lexists(self.file.path):
            self.create(history, self.file.path, keep=True)
            return
        news, rows = self._news(history), history._rows
        if rows.stale:
            news["cut"] = rows.filed_count
        if news or rows.waiting or always:
            note = self._note(history, news) if news or always else None
            rows.write(self.file, history.steps, note, durable=durable)
            rows.stale = 0
            self.remember(history)

    def create(self, history: History, path: Path, *, keep: bool) -> None:
        """Write a whole file; with `keep` the record lives there from now on.

        Raises:
            OSError: it cannot be written; what was there before still is.
        """
        everything = {key: [0, getattr(history, key)] for key in schema.LISTS} | Journal()._news(history)
        note = self._note(history, {"format": FORMAT, **everything})
        file, batches = File.create(path, history._rows.batches(history.steps, note))
        if keep:
            history._rows.moved(file, batches)
            self.file = file
            self.remember(history)

    def remember(self, history: History) -> None:
        """The file says now what the history says."""
        for key in schema.LISTS:
            now, place = getattr(history, key), self._place(history, key)
            self.written.setdefault(key, [])[place:] = now[place:]
            self._seen[key] = now
        for key in schema.SINGLE:
            value = getattr(history, key)
            self.written[key] = dict(value) if isinstance(value, dict) else value
        self.written["ends"] = _loose_ends(history)

    def _news(self, history: History) -> dict[str, Any]:
        """What the file does not say of the frame; a note for `schema.merge`."""
        news: dict[str, Any] = {}
        for key in schema.LISTS:
            before, now, place = self.written.get(key, []), getattr(history, key), self._place(history, key)
            if place < max(len(before), len(now)):
                news[key] = [place, now[place:]]
        for key in schema.SINGLE:
            if key not in self.written or self.written[key] != getattr(history, key):
                news[key] = getattr(history, key)
        if (ends := _loose_ends(history)) != self.written.get("ends", {}):
            news["ends"] = ends
        return news

    def _place(self, history: History, key: str) -> int:
        """From where on the file does not say what a list of the history does."""
        before: list[Any] = self.written.get(key, [])
        now: list[Any] = getattr(history, key)
        known = self._seen.get(key) is now and len(now) >= len(before) > 0
        start, stop = len(before) - 1 if known else 0, min(len(before), len(now))
        return next((i for i in range(start, stop) if before[i] is not now[i] and before[i] != now[i]), stop)

    @staticmethod
    def _note(history: History, news: Mapping[str, Any]) -> str:
        """The text of a note; a freezing says how many checks its component's series has."""
        note = {key: schema.plain(value) for key, value in news.items()}
        if "events" in note:
            for event in note["events"][1]:
                event["checks"] = history._ends.get(event["name"])
        if "savings" in note:
            note["savings"] = schema.sound(history.savings)
        return json.dumps(note, allow_nan=False, separators=(",", ":"))


def _loose_ends(history: History) -> dict[str, int]:
    """Component name -> length of its series, of those that end without having frozen."""
    frozen = history.frozen
    return {name: end for name, end in history._ends.items() if name not in frozen}


def read(path: Path) -> tuple[dict[str, Any], list[int], Rows, dict[str, int]]:
    """What a file holds: the checked frame, the steps, the rows, and component name -> length of a shorter series.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no history.
    """
    frame: dict[str, Any] = {}
    steps: list[int] = []
    rows = Rows(0)
    rows.file = File.open(path)
    widest = 0
    for batch in rows.file.batches():
        for note in batch.notes:
            schema.merge(frame, schema.parse(note))
            if "cut" in frame:
                rows.cut(schema.count(frame.pop("cut"), "a note's cut"))
                del steps[rows.count :]
        steps += batch.steps
        rows.filed(batch)
        widest = max(widest, batch.width)
    if frame.get("format") != FORMAT:
        raise ValueError(f"this is no GradES history of format {FORMAT} (format: {str(frame.get('format'))[:20]!r}).")
    marks = [event.pop("checks", None) if isinstance(event, dict) else None for event in frame.get("events", ())]
    checked = schema.frame(frame)
    rows.width = len(checked["components"])
    if widest > rows.width:
        raise ValueError("this GradES history is damaged: a row has more values than there are components.")
    steps = schema.checks(steps)
    known = {component["name"] for component in checked["components"]}
    ends = schema.ends(frame.get("ends"), known, len(steps))
    named = {event["name"]: end for event, end in zip(checked["events"], marks, strict=True) if end is not None}
    return checked, steps, rows, ends | schema.ends(named, known, len(steps))
