"""How benchmarks measure: each contestant in a process of its own, all of them in turns, and what machine that was on.

The processes of a group wait for each other, so one that measures has the machine to itself, and what else happens on
the machine hits all of them alike. Standard library only: some contestants run in another Python environment.
"""

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

# What decides which kernels oneDNN takes, in TensorFlow as in torch and in OpenVINO.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_HEALTH_POLL_SECONDS = 0.05
_LOG_LINES = 100


def answer_rounds(build):
    """The side of the process that measures: prepares once, then answers each line it reads with one round.

    Args:
        build: Function that prepares all and warms it up. It returns a dict of what is worth knowing about it, such as
            versions, and a function that measures one round: a list of numbers for `take_turns`, or else anything that
            JSON can hold.
    """
    # Libraries print as they like; the answers go where standard output was.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        about, measure_round = build()
        print(json.dumps(about), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(measure_round()), file=answers, flush=True)


class Contestant:
    """The other side: a process that prepares, and then answers rounds.

    Args:
        name: What to call it in errors.
        command: List of program and arguments.
        environment: Dict of environment variables beside those of this process.
    """

    def __init__(self, name, command, environment):
        self._name = name
        self._log = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What TensorFlow says at its start is of interest only where something fails.
            stderr=self._log,
            text=True,
            env=os.environ | environment,
            # Ctrl-C is for this process, which then ends the other.
            start_new_session=True,
        )

    def wait_until_ready(self):
        """Returns what the process says about itself."""
        return self._receive()

    def measure_round(self):
        """Returns the numbers of one round."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, and that tells why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._receive()

    def _receive(self):
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise ChildProcessError(f"{self._log.read()}{self._name} ended with exit code {code}")
        return json.loads(line)

    def close(self):
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


class Server:
    """A server and all processes that it starts, in a session of their own.

    Args:
        name: What to call it in errors.
        command: List of program and arguments.
        environment: Dict of environment variables beside those of this process.
        url: `http://host:port` that it listens at; `/health` answers 200 once it serves.
        folder: Its current folder.

    Attributes:
        url: As given.
    """

    def __init__(self, name, command, environment, url, folder):
        self.url = url
        self._name = name
        self._log = tempfile.TemporaryFile()
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | environment,
            cwd=folder,
            start_new_session=True,
        )

    def wait_until_healthy(self, timeout=300):
        """Returns the seconds from the start until it was healthy.

        Raises:
            ChildProcessError: If it ends or is not healthy in time; with what it wrote.
        """
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=timeout):
                return time.perf_counter() - self._started
            if self._process.poll() is not None:
                raise ChildProcessError(
                    f"{self.read_log()}{self._name} ended with exit code {self._process.returncode}"
                )
            if time.perf_counter() - self._started > timeout:
                raise ChildProcessError(f"{self.read_log()}{self._name} is not healthy after {timeout} seconds")
            time.sleep(_HEALTH_POLL_SECONDS)

    def memory(self):
        """Returns the bytes of memory that its processes take together; see `memory_of`."""
        return memory_of(processes_of_session(self._process.pid))

    def end(self, timeout=60):
        """Ends it as an operator does, by SIGTERM, and returns its exit code.

        Raises:
            subprocess.TimeoutExpired: If it goes on.
        """
        os.kill(self._process.pid, signal.SIGTERM)
        return self._process.wait(timeout)

    def read_log(self, lines=_LOG_LINES):
        """Returns the last lines of what it wrote so far."""
        # Not through the handle that the server writes with: they share a position.
        text = Path(f"/proc/self/fd/{self._log.fileno()}").read_text(errors="replace")
        return "".join(text.splitlines(keepends=True)[-lines:])

    def close(self):
        """Ends all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def find_free_port():
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def memory_of(pids):
    """Returns the bytes of memory that lie in RAM for some processes: their own pages, and once those they share.

    Of one process that is its resident set size. The proportional set size would depend on who else runs here: half of
    a library would count for another contestant. Which pages are shared by whom is not known, so what one process
    shares is taken to hold what the others share.
    """
    own, shared = 0, [0]
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        kilobytes = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
        own += 1024 * (kilobytes["Private_Clean"] + kilobytes["Private_Dirty"])
        shared.append(1024 * (kilobytes["Shared_Clean"] + kilobytes["Shared_Dirty"]))
    return own + max(shared)


def processes_of_session(session):
    """Yields the ids of the processes of a session."""
    for folder in Path("/proc").glob("[0-9]*"):
        # The name, in brackets, may hold anything; after it come state, parent, process group and session.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == session:
                yield int(folder.name)


def take_turns(commands, rounds, say):
    """Starts all contestants, waits until the last one is ready, and lets them measure in turns: A B C A B C.

    Args:
        commands: Dict of name -> `(command, environment)`.
        rounds: Number of turns each.
        say: Function that is called with a line on what happens.

    Returns:
        Dict of name -> list of all numbers, and a dict of what the contestants said about themselves.

    Raises:
        ChildProcessError: If a contestant fails.
    """
    with contextlib.ExitStack() as stack:
        contestants = {}
        for name, command in commands.items():
            contestants[name] = Contestant(name, *command)
            stack.callback(contestants[name].close)
        about = {}
        for name, contestant in contestants.items():
            say(f"{name}: preparing")
            about |= contestant.wait_until_ready()
        numbers = {name: [] for name in contestants}
        for turn in range(rounds):
            for name, contestant in contestants.items():
                say(f"{name}: round {turn + 1} of {rounds}")
                numbers[name] += contestant.measure_round()
    return numbers, about


def describe_machine():
    """Returns a dict of this machine's processor, cores and load, for JSON."""
    # Linux. The first processor stands for all.
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    processor = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = processor.get("flags", "").split()
    return {
        "cpu": processor.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        # Above zero something else was running.
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
