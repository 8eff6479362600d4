from __future__ import annotations

import time

import pytest

from furiosa_llm.cli import progress as progress_module
from furiosa_llm.cli.progress import progress


def test_short_commands_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as report:
        report("working")
    assert capsys.readouterr() == ("", "")


def test_long_commands_say_what_they_do_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "QUIET_SECONDS", 0.05)
    with progress() as report:
        report("first")
        report("second")
        time.sleep(0.3)
        report("third")
        time.sleep(0.3)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("] ")[1] for line in lines] == ["second", "third"]


def test_many_short_activities_do_not_make_many_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "QUIET_SECONDS", 0.1)
    with progress() as report:
        for number in range(30):
            report(f"step {number}")
            time.sleep(0.01)
    assert 1 <= len(capsys.readouterr().err.splitlines()) <= 6
