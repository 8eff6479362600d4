"""Compile buckets in several processes. What comes out does not depend on how many there are."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from queue import SimpleQueue

from .. import errors
from ..models.config_types import Bucket
from .compile import CompiledBucket, Progress
from .compile_worker import Shared

WORKER = "furiosa_llm.artifact.compile_worker"


def processes_for(workers: int, buckets: int) -> int:
    """At most `workers`, and no more than there are buckets or processors."""
    return min(workers, buckets, len(os.sched_getaffinity(0)))


def compile_in_processes(
    shared: Shared, buckets: Sequence[Bucket], processes: int, progress: Progress
) -> Generator[CompiledBucket]:
    """The binaries of `buckets` in their order.

    Buckets with most tokens are begun first, so that none of them is what the others wait for.
    Raises: what compiling raises, for the first bucket that fails; BLD019 if a process dies.
    """
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        workers = [_Worker(shared) for _ in range(processes)]
        threads = stack.enter_context(ThreadPoolExecutor(processes))
        for worker in workers:
            stack.callback(worker.end)  # before the threads are joined, which wait for answers
            idle.put(worker)

        def run(bucket: Bucket) -> CompiledBucket:
            worker = idle.get()
            try:
                return worker.compile(bucket)
            finally:
                idle.put(worker)

        longest_first = sorted(buckets, key=lambda b: -b.batch_size * b.input_ids_size)
        answers = {bucket: threads.submit(run, bucket) for bucket in longest_first}
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        for bucket in buckets:
            progress(f"compiling {bucket.name}, {processes} buckets at a time")
            yield answers[bucket].result()


class _Worker:
    """One process; answers one bucket at a time."""

    def __init__(self, shared: Shared) -> None:
        # Not `multiprocessing`: it runs the user's script again, which need not expect that.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path),
            },
        )
        self._shared: Shared | None = shared

    def compile(self, bucket: Bucket) -> CompiledBucket:
        """Raises: what compiling raises; BLD019."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if self._shared is not None:
                pickle.dump(self._shared, self._process.stdin)
                self._shared = None
            pickle.dump(bucket, self._process.stdin)
            self._process.stdin.flush()
            answer: CompiledBucket | Exception = pickle.load(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise errors.worker_died(bucket.name, self._process.wait()) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
