"""Callers of a server who send whatever bytes they like, and what each request costs the server and others."""

import json
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

HANG_UP = object()  # among the pieces of a request: the caller goes away
ASLEEP = 1.0  # a number among them is a pause in seconds
TIMEOUT = 60
CLOSED, UNANSWERED = 0, -1  # as a status: the connection ended without an answer, or lasts without one


@dataclass(frozen=True)
class Case:
    """A request and what is answered.

    Attributes:
        name: What it is, in words.
        build: Function that returns the bytes of the request, or an iterable of pieces, pauses and `HANG_UP`.
        status: The HTTP status, or `CLOSED`.
        message: Part of the answer: of the field `message` where it has one.
        answers: How many there are; status and message are the last one's.
        slow: Whether it takes half a minute by design; such requests are sent beside the others.
        cheap: Whether it takes next to nothing of the server or of who sends it.
    """

    name: str
    build: Callable
    status: int
    message: str
    answers: int = 1
    slow: bool = False
    cheap: bool = True


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        status: The HTTP status, or `CLOSED`.
        head: Bytes of the answer's head.
        text: Its body.
        seconds: From the begin of sending.
    """

    status: int
    head: bytes
    text: str
    seconds: float

    @property
    def message(self):
        """The field `message` of the answer, or all of it."""
        with suppress(ValueError, TypeError, KeyError):
            return json.loads(self.text)["message"]
        return self.text


def send(case, address):
    """Sends the request of a case on a connection of its own.

    Args:
        case: `Case`.
        address: Host and port.

    Returns:
        `Outcome`.
    """
    request = case.build()
    pieces = iter([request] if isinstance(request, bytes) else request)
    started = time.perf_counter()
    received, answers = b"", []
    with socket.create_connection(address, timeout=TIMEOUT) as connection:
        connection.setblocking(False)
        unsent, wake = memoryview(b""), 0.0
        while len(answers) < case.answers:
            if not unsent and pieces and time.perf_counter() >= wake:
                piece = next(pieces, None)
                if piece is HANG_UP:
                    break
                if piece is None:
                    pieces = None
                elif isinstance(piece, float):
                    wake = time.perf_counter() + piece
                else:
                    unsent = memoryview(piece)
            wait = TIMEOUT if not pieces else max(wake - time.perf_counter(), 0)
            readable, writable, _ = select.select([connection], [connection] if unsent else [], [], wait)
            if not (readable or writable or pieces):
                return Outcome(UNANSWERED, b"", f"no answer in {TIMEOUT} s", TIMEOUT)
            try:
                if writable:
                    unsent = unsent[connection.send(unsent) :]
                if readable:
                    chunk = connection.recv(65536)
                    received += chunk
                    if not chunk:
                        break
            except ConnectionError:
                # What is left of a request that was refused early; its answer may still lie here.
                unsent, pieces = memoryview(b""), None
                if readable:
                    break
            while answer := _split_answer(received):
                *answer, received = answer
                if answer[0] != 100:
                    answers.append(answer)
    status, head, body = answers[-1] if answers else (CLOSED, b"", b"")
    return Outcome(status, head, body.decode(), time.perf_counter() - started)


def _split_answer(received):
    """Returns status, head, body and the bytes behind the first whole answer, or None."""
    head, end, rest = received.partition(b"\r\n\r\n")
    if not end:
        return None
    status = int(head.split()[1])
    length = 0 if status == 100 else int(head.lower().partition(b"content-length:")[2].split()[0])
    return (status, head, rest[:length], rest[length:]) if len(rest) >= length else None


class Witness:
    """Another caller, who sends one good request after the other; a context manager.

    Args:
        case: `Case` that is answered with 200.
        address: Host and port.
    """

    def __init__(self, case, address):
        self._case = case
        self._address = address
        self._longest = 0.0
        self._begun = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _ask(self):
        while not self._ended.wait(0.005):
            self._begun = time.perf_counter()
            outcome = send(self._case, self._address)
            # Not answered is the longest wait of all.
            self._longest = max(self._longest, outcome.seconds if outcome.status == 200 else TIMEOUT)
            self._begun = None

    def longest_wait(self):
        """Returns the seconds that it has waited at most since this was asked before."""
        begun = self._begun
        while begun is not None and self._begun == begun:
            time.sleep(0.005)  # what happened meanwhile is this wait's
        longest, self._longest = self._longest, 0.0
        return longest


class Memory:
    """How much more memory a process takes at its peak than it had; a context manager.

    Args:
        pid: Of the process.

    Attributes:
        extra: Bytes, at the end.
    """

    def __init__(self, pid):
        self._folder = Path(f"/proc/{pid}")

    def __enter__(self):
        (self._folder / "clear_refs").write_text("5")  # begins a new peak
        self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_):
        self.extra = self._read("VmHWM") - self._before

    def _read(self, name):
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def run_all(cases, witnessed, address, pid):
    """Sends cases one after another; the slow ones beside them.

    Args:
        cases: List of `Case`.
        witnessed: `Case` that another caller sends all the time.
        address: Host and port.
        pid: Of the server's process.

    Yields:
        `Case`, `Outcome`, bytes of extra memory and seconds that another caller waited at most.
    """
    with ThreadPoolExecutor(16) as threads, Witness(witnessed, address) as witness:
        slow = {case: threads.submit(send, case, address) for case in cases if case.slow}
        for case in cases:
            if not case.slow:
                with Memory(pid) as memory:
                    outcome = send(case, address)
                    wait = witness.longest_wait()
                yield case, outcome, memory.extra, wait
        for case, future in slow.items():
            yield case, future.result(), 0, witness.longest_wait()
