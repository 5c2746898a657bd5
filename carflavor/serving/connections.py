"""Connections that end where a caller takes for ever, and not while a request is on its way."""

import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SECONDS_TO_SEND = 30  # a whole body
_SECONDS_TO_LINGER = 0.5
_LARGEST_HEAD = 65_536  # bytes
_UPGRADE = re.compile(rb"\nupgrade(?=:)", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """A connection of uvicorn's that ends where a caller takes for ever, and not while a request is on its way.

    uvicorn takes heads of any length, waits without end for them and for who does not read its answers, and at SIGTERM
    hangs up on everybody who waits for none at that moment.
    """

    def connection_made(self, transport):
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._before = b""
        self._ending = False
        # Of the first request, of each one, and of answers that are not read.
        self._sending = self._abort_after(SECONDS_TO_SEND)
        self._reading = None

    def connection_lost(self, exc):
        self._sending.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data):
        self._head_bytes += len(data)
        super().data_received(self._without_upgrade(data) if self._in_head else data)
        if self._head_bytes > _LARGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"expected a head of at most {_LARGEST_HEAD:,} bytes, got more")

    def on_message_begin(self):
        super().on_message_begin()
        self._sending.cancel()
        self._sending = self._abort_after(SECONDS_TO_SEND + 1)  # the app refuses a body that is late before

    def on_headers_complete(self):
        super().on_headers_complete()
        self._head_bytes = 0
        self._in_head = False
        self._before = b""
        if self._ending:
            self.cycle.keep_alive = False

    def on_body(self, body):
        super().on_body(body)
        self._head_bytes = 0

    def on_message_complete(self):
        super().on_message_complete()
        self._head_bytes = 0
        self._in_head = True
        self._sending.cancel()

    def pause_writing(self):
        super().pause_writing()
        self._reading = self._abort_after(SECONDS_TO_SEND)

    def resume_writing(self):
        super().resume_writing()
        if self._reading:
            self._reading.cancel()

    def shutdown(self):
        self._ending = True
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_SECONDS_TO_LINGER, super().shutdown)
        else:
            super().shutdown()

    def _without_upgrade(self, data):
        # A server may ignore a wish for another protocol, as Java's client has it for HTTP/2. httptools does not: it
        # stops, and the body is never read. The name is changed behind its last letter: the parser may have the rest.
        before = self._before
        head, end, rest = (before + data).partition(b"\r\n\r\n")
        self._before = (before + data)[-len(b"\nupgrade") :]
        return (_UPGRADE.sub(rb"\g<0>-Ignored", head) + end + rest)[len(before) :]

    def _abort_after(self, seconds):
        return self.loop.call_later(seconds, self.transport.abort)
