"""Worker processes, with patience for those that are busy."""

import time

from uvicorn.supervisors import multiprocess

_SECONDS_TO_ANSWER = 60


class Worker(multiprocess.Process):
    """A worker process of uvicorn's that is killed only when it has not answered for a minute.

    uvicorn waits 5 s for the answer and then kills it, with all that it has taken: on a machine that swaps, also one
    that only starts. Told to wait for longer, it would see neither a signal nor a worker's death meanwhile.
    """

    _asked = None

    def ping(self, timeout=0):
        """Says whether the process has answered lately; asks it, and does not wait."""
        try:
            if self._asked is None:
                self.parent_conn.send(b"ping")
                self._asked = time.monotonic()
            if self.parent_conn.poll():
                self.parent_conn.recv()
                self._asked = None
        except (OSError, EOFError):
            return False
        return self._asked is None or time.monotonic() - self._asked < _SECONDS_TO_ANSWER


def use_patient_workers():
    """Has uvicorn start its worker processes as `Worker`."""
    multiprocess.Process = Worker
