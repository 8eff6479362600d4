"""Replace a directory as a whole: readers and killed builds see the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from .. import errors
from .schema import ARTIFACT_FILE, MANIFEST_FILE

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_replaceable(target: Path) -> None:
    """Refuse to replace anything but an artifact or an empty directory. Raises: ART002."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise errors.output_not_replaceable(str(target), "it exists and is not a directory")
    if not any(target.iterdir()):
        return
    for name in (ARTIFACT_FILE, MANIFEST_FILE):
        if not (target / name).is_file():
            reason = f"it is a directory with files but no {name}, so no build wrote it"
            raise errors.output_not_replaceable(str(target), reason)


def check_free_space(target: Path, needed_bytes: int) -> None:
    """Raises: BLD009 if the file system that will hold `target` has less room than needed."""
    existing = next(parent for parent in target.parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise errors.disk_too_small(str(existing), needed_bytes, free_bytes)


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of `target` when the block succeeds.

    It lies beside `target`, so that taking its place is one rename. If the block fails, nothing
    is left of it; after a kill, the next build removes it.

    Raises: ART002, ART003 if another process is at it, ART004.
    """
    target = Path(os.path.realpath(target))  # a link to an artifact stays a link
    check_replaceable(target)
    with _made_parents(target), _locked(target):
        _recover(target)
        staging = target.with_name(f".{target.name}.building-{secrets.token_hex(4)}")
        try:
            with _os_errors(target):
                staging.mkdir()
            with _full_disk(target):
                yield staging
            with _os_errors(target):
                _sync(staging)
                check_replaceable(target)
                _take_place(staging, target)
                _sync_directory(target.parent)
        finally:
            # Holds the old artifact after success, an unfinished one after failure.
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    """Create missing parents, and remove them again if the block fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    with _os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in missing:
            with suppress(OSError):  # somebody else put something there
                parent.rmdir()
        raise


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    path = target.with_name(f".{target.name}.lock")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise errors.output_busy(str(target)) from error
    except OSError as error:
        raise errors.output_not_writable(str(target), errors.in_words(error)) from error
    try:
        yield
    finally:
        # Removed while held: a waiter that opened it finds it unlinked and starts again.
        path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _os_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.output_not_writable(str(target), errors.in_words(error)) from error


@contextmanager
def _full_disk(target: Path) -> Iterator[None]:
    """Only writing can fail like this; other failures of the block are not about the output."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise errors.output_not_writable(str(target), errors.in_words(error)) from error


def _sync(directory: Path) -> None:
    """Bring every file and directory below `directory` to the disk, files first."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(staging: Path, target: Path) -> None:
    """Put `staging` where `target` is; whatever was there ends up at `staging`."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        # Without an exchange there is a moment with neither; `_recover` heals a kill in it.
        target.rename(_aside(target))
        staging.rename(target)
        _aside(target).rename(staging)


def _recover(target: Path) -> None:
    """Undo what a killed build left behind."""
    if _aside(target).exists() and not target.exists():
        _aside(target).rename(target)
    for stale in target.parent.glob(f".{glob.escape(target.name)}.building-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _exchange(left: Path, right: Path) -> bool:
    """Swap two directories in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(left), os.fsencode(right)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
