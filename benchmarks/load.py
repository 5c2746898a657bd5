"""Clients that send photos to a server: each sends a request, reads the whole answer, and sends the next.

    python benchmarks/load.py http://127.0.0.1:8080/invocations requests.jsonl --clients 16 --seconds 10

The file has the body of a request in each line. The last line is JSON: photos a second, latencies, the share of a core
that the clients themselves took. `run_load` is the same for other scripts, with each single answer.

One process, one thread and bare sockets, because clients share the machine with the server that they measure: standard
library only, requests put together beforehand, connections kept alive, answers not looked into.
"""

import argparse
import json
import math
import re
import selectors
import socket
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

TIMEOUT = 120.0  # seconds; MLflow's own is 60
_PAUSE = 0.1  # seconds, after a connection failed: a server that is down is not to be called without end
_CHUNK = 65536
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)


class Answer(NamedTuple):
    """What came of one request.

    Attributes:
        body: Index of the request's body.
        status: The HTTP status, or 0 where there was no whole answer.
        started: When the request was begun, as `time.perf_counter` gives it.
        seconds: From then until the last byte of the answer was read.
        error: What went wrong where the status is 0, else an empty text.
    """

    body: int
    status: int
    started: float
    seconds: float
    error: str = ""


def run_load(url, bodies, clients, seconds, content_type="application/json", timeout=TIMEOUT):
    """Sends requests from several clients at once, and waits until the last one is answered.

    Each client takes every body in turn; they begin at different ones.

    Args:
        url: `http://host:port/path`.
        bodies: List of bytes.
        clients: Number of clients.
        seconds: For how long new requests are sent.
        content_type: Of the bodies.
        timeout: Seconds after which an answer is no longer waited for.

    Returns:
        List of `Answer` in the order in which they ended.
    """
    parts = urlsplit(url)
    family, *_, address = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
    requests = [
        f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
        for body in bodies
    ]
    answers = []
    with selectors.DefaultSelector() as selector:
        everyone = [
            _Client(selector, family, address, requests, index * len(requests) // clients, timeout, answers)
            for index in range(clients)
        ]
        end = time.perf_counter() + seconds
        while (now := time.perf_counter()) < end or any(client.waiting for client in everyone):
            for client in everyone:
                client.attend(now, now < end)
            for key, events in selector.select(_PAUSE):
                key.data.handle(events)
                # At once, so that the server is never short of a client's next request.
                key.data.attend(time.perf_counter(), time.perf_counter() < end)
        for client in everyone:
            client.close()
    return answers


class _Client:
    """One connection, and the request that is under way on it."""

    def __init__(self, selector, family, address, requests, position, timeout, answers):
        self._selector = selector
        self._family = family
        self._address = address
        self._requests = requests
        self._position = position
        self._timeout = timeout
        self._answers = answers
        self._socket = None
        self._not_before = 0.0
        self.waiting = False

    def attend(self, now, may_begin):
        """Begins the next request where none is under way, and gives up one that took too long."""
        if self.waiting and now - self._started > self._timeout:
            self._fail(f"no answer in {self._timeout:g} seconds")
        if may_begin and not self.waiting and now >= self._not_before:
            self._begin(now)

    def handle(self, events):
        """Goes on where the socket can."""
        if events & selectors.EVENT_WRITE:
            self._send()
        if events & selectors.EVENT_READ:
            if self.waiting:
                self._receive()
            else:
                # The server ended an idle connection.
                self.close()

    def close(self):
        """Ends the connection."""
        if self._socket:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _begin(self, now):
        self._started = now
        self.waiting = True
        self._unsent = memoryview(self._requests[self._position])
        self._received = bytearray()
        self._expected = None
        self._send_error = ""
        if self._socket is None:
            self._socket = socket.socket(self._family, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(self._socket, selectors.EVENT_READ, self)
            # Where that fails, sending tells why.
            self._socket.connect_ex(self._address)
        self._send()

    def _send(self):
        try:
            self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            # The server may have answered before it read all, and closed: the answer then still lies here.
            self._unsent = self._unsent[:0]
            self._send_error = f"sending: {error!r}"
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        if self._selector.get_key(self._socket).events != events:
            self._selector.modify(self._socket, events, self)

    def _receive(self):
        try:
            chunk = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(repr(error))
            return
        if not chunk:
            self._fail(self._send_error or f"the connection was closed after {len(self._received)} bytes of an answer")
            return
        self._received += chunk
        if self._expected is None and (head_end := self._received.find(b"\r\n\r\n")) >= 0:
            self._head = bytes(self._received[: head_end + 2])
            if not (length := _LENGTH.search(self._head)):
                self._fail("expected an answer with a Content-Length, got one without")
                return
            self._expected = head_end + 4 + int(length[1])
        if self._expected is not None and len(self._received) >= self._expected:
            status = int(self._head.split(b" ", 2)[1])
            # What is left of a request that was answered early would be read as the next one.
            if self._unsent or _CLOSES.search(self._head):
                self.close()
            self._end(status)

    def _fail(self, error):
        self.close()
        self._end(0, error)
        self._not_before = time.perf_counter() + _PAUSE

    def _end(self, status, error=""):
        seconds = time.perf_counter() - self._started
        self._answers.append(Answer(self._position, status, self._started, seconds, error))
        self._position = (self._position + 1) % len(self._requests)
        self.waiting = False


def summarize(answers, start, seconds):
    """Returns the figures of the answers that ended in a span of time, as a dict for JSON.

    Args:
        answers: List of `Answer`.
        start: Begin of the span, as `time.perf_counter` gives it.
        seconds: Length of the span.
    """
    ended = [answer for answer in answers if start <= answer.started + answer.seconds < start + seconds]
    good = sorted(answer.seconds for answer in ended if answer.status == 200)
    return {
        "per_second": len(good) / seconds,
        **{f"p{percent}_ms": 1000 * percentile(good, percent) if good else None for percent in (50, 95, 99)},
        "answers": len(good),
        # Of all, the first and the last ones, too.
        "failures": Counter(f"{answer.status} {answer.error}".strip() for answer in answers if answer.status != 200),
    }


def percentile(ordered, percent):
    """Returns the least of some ordered numbers that at least so many percent of them do not exceed."""
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="http://host:port/path")
    parser.add_argument("bodies", type=Path, help="File with the body of a request in each line.")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--warm-up", type=float, default=0.0, help="Seconds before the measured ones.")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    bodies = options.bodies.read_bytes().splitlines()
    if not bodies or options.clients < 1:
        parser.error("expected at least one body and one client")
    started, cpu_started = time.perf_counter(), time.process_time()
    answers = run_load(options.url, bodies, options.clients, options.warm_up + options.seconds)
    cpu = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    figures = summarize(answers, started + options.warm_up, options.seconds)
    print(json.dumps(figures | {"clients_cpu": cpu}))


if __name__ == "__main__":
    main()
