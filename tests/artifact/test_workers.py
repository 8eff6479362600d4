"""Several processes compile the buckets of one model: same bytes, whole errors, no remains."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from model_zoo import make_model

from furiosa_llm.artifact import workers
from furiosa_llm.artifact.compile import CompileOptions, compile_bucket, import_shared
from furiosa_llm.artifact.compile_worker import Shared
from furiosa_llm.artifact.tilings import TilingPins
from furiosa_llm.artifact.workers import compile_in_processes, processes_for
from furiosa_llm.errors import FuriosaLLMError
from furiosa_llm.frontend.source import open_model
from furiosa_llm.ir.text import parse_module, print_module
from furiosa_llm.models.config_types import Bucket

BUCKETS = (Bucket.prefill(1, 8), Bucket.decode(1, 16), Bucket.decode(2, 16))
OPTIONS = CompileOptions(level=0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    model = make_model("llama", tmp_path_factory.mktemp("zoo") / "tiny-llama")
    module = import_shared(open_model(model).config, None, last_token_only=True, dump_ir=None)
    return Shared(print_module(module), "LlamaForCausalLM", OPTIONS, dump_ir=None)


def processes() -> list[psutil.Process]:
    """The workers that are alive."""
    children = psutil.Process().children(recursive=True)
    return [one for one in children if workers.WORKER in one.cmdline()]


def test_binaries_are_those_of_one_process_and_come_in_order(
    shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("torch", "transformers"):  # workers find these first, and must not want them
        (tmp_path / library).mkdir()
        (tmp_path / library / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    told: list[str] = []
    compiled = list(compile_in_processes(shared, BUCKETS, 2, told.append))
    module = parse_module(shared.module)
    alone = [compile_bucket(module, shared.name, bucket, OPTIONS, None) for bucket in BUCKETS]
    assert compiled == alone
    assert told[0] == "compiling prefill:1,8, 2 buckets at a time"
    assert processes() == []


def test_an_error_arrives_whole(shared: Shared) -> None:
    record = "weights-stream tokens=2 rows=16 load_rows=16 load_chunks=1 command_chunks=1"
    pins = TilingPins({"decode:2,*": {"no.such_module": record}})
    wrong = Shared(shared.module, shared.name, CompileOptions(level=0, pins=pins), None)
    compiled = compile_in_processes(wrong, BUCKETS, 2, lambda _: None)
    assert [next(compiled).bucket, next(compiled).bucket] == list(BUCKETS[:2])
    with pytest.raises(FuriosaLLMError) as caught:
        next(compiled)
    assert (caught.value.code, caught.value.exit_code) == ("BLD016", 2)
    assert "`no.such_module`" in str(caught.value)
    assert caught.value.next_step
    assert "compile_bucket" in caught.value.__notes__[0]  # the worker's traceback, for --debug
    assert processes() == []


def test_who_stops_asking_ends_the_processes(shared: Shared) -> None:
    compiled = compile_in_processes(shared, BUCKETS, 2, lambda _: None)
    next(compiled)
    assert len(processes()) == 2
    compiled.close()
    assert processes() == []


def test_a_process_that_dies_is_an_error_with_its_status(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "WORKER", "furiosa_llm.no_such_module")
    with pytest.raises(FuriosaLLMError, match="ended with 1") as caught:
        next(compile_in_processes(shared, BUCKETS, 2, lambda _: None))
    assert caught.value.code == "BLD019"


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_worker_ends_quietly_when_its_parent_has_gone(shared: Shared, share: float) -> None:
    sent = pickle.dumps(shared)
    worker = subprocess.run(
        [sys.executable, "-m", workers.WORKER],
        input=sent[: int(share * len(sent))],
        capture_output=True,
        check=True,
    )
    assert (worker.stdout, worker.stderr) == (b"", b"")


def test_no_more_processes_than_buckets_or_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [processes_for(asked, buckets=7) for asked in (1, 3, 4, 64)] == [1, 3, 4, 4]
    assert processes_for(4, buckets=2) == 2
