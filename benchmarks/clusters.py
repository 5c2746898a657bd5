"""A real Spark standalone cluster on this machine: a master and workers in sessions of their own. For tests, too."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyspark
from measuring import find_free_port, processes_of_session

_SPARK = Path(pyspark.__file__).parent
_SECONDS_TO_START = 90
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Daemon:
    """A process of Spark's with all that it starts, such as a worker's executors and their Pythons.

    Args:
        arguments: List of what `spark-class` is given.
        log: `Path` of the file for what it prints.
        before: List of a command that is to run it, if any.
    """

    def __init__(self, arguments, log, before=()):
        self._log = log
        environment = {
            **os.environ,
            "SPARK_HOME": str(_SPARK),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_DAEMON_MEMORY": "256m",
            "PYSPARK_PYTHON": sys.executable,
        }
        command = [*before, _SPARK / "bin" / "spark-class", *arguments]
        with open(log, "wb") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
                # Out of reach of a Ctrl-C, it would outlive whoever cannot end it any more.
                preexec_fn=lambda: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )

    def wait_for(self, text):
        """Waits until it has printed a text."""
        deadline = time.monotonic() + _SECONDS_TO_START
        while text not in self._log.read_text(errors="replace"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ChildProcessError(f"{self._log.read_text(errors='replace')}expected {text!r}")
            time.sleep(0.05)

    def pythons(self):
        """Yields the ids of the processes of Python that it has started."""
        for process in processes_of_session(self._process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{process}/comm").read_text().startswith("python"):
                    yield process

    def kill(self):
        """Kills it and all that it has started, as a machine does that fails."""
        # Not the process group alone: Spark gives its Pythons one of their own.
        while alive := list(processes_of_session(self._process.pid)):
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.poll()
        self._process.wait()


class Cluster:
    """A master and one-core workers; a context manager.

    Args:
        folder: `Path` of a folder for logs and for what workers keep.
        workers: Number of workers.

    Attributes:
        master: Its address, `spark://...`.
        workers: List of `Daemon`.
    """

    def __init__(self, folder, workers):
        self._folder = folder
        self._number = workers
        self.workers = []

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            port = find_free_port()
            self.master = f"spark://127.0.0.1:{port}"
            arguments = ["--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
            master = Daemon(["org.apache.spark.deploy.master.Master", *arguments], self._folder / "master.log")
            stack.callback(master.kill)
            stack.callback(lambda: [worker.kill() for worker in self.workers])
            master.wait_for("New state: ALIVE")
            for _ in range(self._number):
                self.start_worker()
            for worker in self.workers:
                worker.wait_for("Successfully registered")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def start_worker(self, before=()):
        """Starts one more worker and returns it.

        Args:
            before: List of a command that is to run it, if any.
        """
        name = f"worker-{len(self.workers)}"
        arguments = ["--host", "127.0.0.1", "--webui-port", "0", "--cores", "1", "--memory", "1g"]
        arguments += ["--work-dir", self._folder / name, self.master]
        worker = Daemon(["org.apache.spark.deploy.worker.Worker", *arguments], self._folder / f"{name}.log", before)
        self.workers.append(worker)
        return worker


@contextlib.contextmanager
def one_and_two_workers(folder):
    """Yields a dict of number of workers -> address of the master of a cluster with so many, for 1 and 2.

    Args:
        folder: `Path` of a folder for what the clusters keep.
    """
    with contextlib.ExitStack() as stack:
        masters = {}
        for workers in (1, 2):
            place = folder / f"cluster of {workers}"
            place.mkdir()
            masters[workers] = stack.enter_context(Cluster(place, workers)).master
        yield masters
