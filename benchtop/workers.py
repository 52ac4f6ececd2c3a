"""A parallel `map` over processes of this machine, with results in the order of the tasks."""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor


def in_parallel(function: Callable, tasks: Iterable, num_workers: int, setup: Callable | None = None,
                arguments: tuple = ()) -> Iterator:
    """`map(function, tasks)` over worker processes: results in task order, two tasks per worker in flight.

    `setup(*arguments)` runs once in each worker. With one worker, everything runs in this process.
    """
    if num_workers <= 1:
        if setup:
            setup(*arguments)
        yield from map(function, tasks)
        return
    tasks = iter(tasks)
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context(_start_method()), _begin_worker,
                             (setup, arguments)) as pool:
        try:
            waiting = deque(pool.submit(function, task) for task in itertools.islice(tasks, 2 * num_workers))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, task) for task in itertools.islice(tasks, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_method() -> str | None:
    """The default start method, or on Linux forkserver if this process has threads, ours or torch's."""
    distributed = sys.modules.get("torch.distributed")
    has_threads = threading.active_count() > 1 or (distributed and distributed.is_initialized())
    return "forkserver" if has_threads and sys.platform == "linux" else None


def _begin_worker(setup: Callable | None, arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if setup:
        setup(*arguments)


def _end_with_parent() -> None:
    """Exit when the parent is killed: it cannot stop its workers, which would wait for tasks forever."""
    multiprocessing.parent_process().join()
    os._exit(1)
