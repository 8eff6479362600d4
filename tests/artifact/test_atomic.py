from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest

from furiosa_llm.artifact import atomic
from furiosa_llm.artifact.schema import ARTIFACT_FILE, MANIFEST_FILE
from furiosa_llm.errors import FuriosaLLMError


def make_artifact(path: Path, content: str) -> None:
    path.mkdir(parents=True)
    for name in (ARTIFACT_FILE, MANIFEST_FILE, "content"):
        (path / name).write_text(content)


def replace(target: Path, content: str) -> None:
    with atomic.replacing_directory(target) as staging:
        for name in (ARTIFACT_FILE, MANIFEST_FILE, "content"):
            (staging / name).write_text(content)


def fail_half_way(target: Path) -> None:
    with atomic.replacing_directory(target) as staging:
        (staging / "half").touch()
        (staging / "not" / "there").touch()


def test_a_new_directory_appears_with_its_parents(tmp_path: Path) -> None:
    replace(tmp_path / "a" / "b", "new")
    assert (tmp_path / "a" / "b" / "content").read_text() == "new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_an_artifact_is_replaced_as_a_whole(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out", "old")
    (tmp_path / "out" / "left-over").touch()
    replace(tmp_path / "out", "new")
    assert (tmp_path / "out" / "content").read_text() == "new"
    assert not (tmp_path / "out" / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_an_atomic_exchange_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda left, right: False)
    make_artifact(tmp_path / "out", "old")
    replace(tmp_path / "out", "new")
    assert (tmp_path / "out" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_artifact_put_aside_by_a_killed_build_comes_back(tmp_path: Path) -> None:
    make_artifact(tmp_path / ".out.replaced", "old")
    with pytest.raises(RuntimeError), atomic.replacing_directory(tmp_path / "out"):
        raise RuntimeError
    assert (tmp_path / "out" / "content").read_text() == "old"


def test_a_link_to_an_artifact_stays_a_link(tmp_path: Path) -> None:
    make_artifact(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "content").read_text() == "new"


def test_a_failed_build_leaves_the_old_artifact_and_nothing_else(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError):
        fail_half_way(tmp_path / "out")
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_build_removes_the_parents_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic.replacing_directory(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from furiosa_llm.artifact.atomic import replacing_directory

with replacing_directory(Path(sys.argv[1])) as staging:
    (staging / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_build_leaves_the_old_artifact_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert len(list(tmp_path.iterdir())) > 1
    replace(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_that_is_no_artifact_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(FuriosaLLMError, match="ART002"):
        replace(tmp_path / "out", "new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(FuriosaLLMError, match="ART002"):
        replace(tmp_path / "out", "new")


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    replace(tmp_path / "out", "new")
    assert (tmp_path / "out" / "content").read_text() == "new"


def test_a_second_build_of_the_same_output_is_refused(tmp_path: Path) -> None:
    second = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from furiosa_llm.artifact.atomic import replacing_directory
        from furiosa_llm.errors import FuriosaLLMError

        try:
            with replacing_directory(Path(sys.argv[1])):
                pass
        except FuriosaLLMError as error:
            print(error.code)
        """
    )
    with atomic.replacing_directory(tmp_path / "out") as staging:
        (staging / "content").touch()
        command = [sys.executable, "-c", second, str(tmp_path / "out")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "ART003"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_cannot_be_made_is_a_coded_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FuriosaLLMError, match="ART004"):
        replace(tmp_path / "file" / "out", "new")


def test_a_full_disk_while_building_is_a_coded_error(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    with (
        pytest.raises(FuriosaLLMError, match="ART004"),
        atomic.replacing_directory(tmp_path / "out"),
    ):
        raise full
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_told_before_building(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1_000_000))
    atomic.check_free_space(tmp_path / "out", 1_000_000)
    with pytest.raises(FuriosaLLMError, match="BLD009") as caught:
        atomic.check_free_space(tmp_path / "not" / "there", 2_000_000)
    assert "--weights link" in caught.value.next_step
