"""One function on many tasks, in several processes of this machine."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import cv2


def map_in_processes(function, tasks, workers):
    """Calls a function on each task.

    Args:
        function: What is called. Each process is sent it once, so it may hold what all tasks need. Not of the main
            module, which the processes do not import.
        tasks: Iterable of what it is called on; each is sent to a process. Not much more of them is taken at a time
            than is worked on.
        workers: Processes; 1 for this one alone.

    Yields:
        What the function returns, in any order.

    Raises:
        OSError: If a process was killed.
    """
    tasks = iter(tasks)
    if workers == 1:
        yield from map(function, tasks)
        return
    # Not forks of this process, whose libraries may have threads: of one that has none, and the imports behind it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, getattr(function, "__module__", type(function).__module__)])
    executor = ProcessPoolExecutor(workers, context, _begin, (function,))
    first = list(itertools.islice(tasks, 2 * workers))

    def start():
        # They inherit this thread's: Ctrl-C is for the process that waits for them, also while they import.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        with _main_module_hidden():
            return {executor.submit(_call, task) for task in first}

    try:
        # They take a second to start, in which this process does what one of them would.
        with ThreadPoolExecutor(1) as starter:
            starting = starter.submit(start)
            for task in tasks:
                yield function(task)
                if starting.done() and any(future.done() for future in starting.result()):
                    break
            pending = starting.result()
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            # A few ahead, so that no process waits for this one.
            pending |= {executor.submit(_call, task) for task in itertools.islice(tasks, 3 * workers - len(pending))}
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise OSError(
            f"One of {workers} processes was killed, probably for lack of memory: give the same command with fewer "
            f"workers, workers={max(1, workers // 2)} say; it goes on where it was"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _main_module_hidden():
    """Has processes that start meanwhile not import what this one was started with, as multiprocessing wants them to.

    A step's main module loads MLflow, matplotlib and more, which takes each process two seconds.
    """
    main = vars(sys.modules["__main__"])
    known = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main.update(dict.fromkeys(known))
    try:
        yield
    finally:
        main.update(known)


_function = None


def _begin(function):
    global _function
    _function = function
    # Ctrl-C is for the process that waits for this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A process a core is threads enough.
    cv2.setNumThreads(1)


def _end_with_parent():
    # Killed, it could tell nobody, and this process would wait for work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(task):
    return _function(task)
