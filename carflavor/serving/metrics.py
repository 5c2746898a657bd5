"""What a server counts, for Prometheus."""

import os
from pathlib import Path

import prometheus_client
import prometheus_client.multiprocess

METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # where worker processes share what they count
_LATENCIES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """What is counted; `render` gives it in the form of `CONTENT_TYPE`."""

    CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "carflavor_requests", "Requests to /invocations.", ["status"], registry=self._registry
        )
        self.seconds = prometheus_client.Histogram(
            "carflavor_request_seconds",
            "Seconds from the head of a request to the end of its answer.",
            buckets=_LATENCIES,
            registry=self._registry,
        )
        self.photos = prometheus_client.Counter(
            "carflavor_photos", "Photos of answered requests.", registry=self._registry
        )
        self.batches = prometheus_client.Histogram(
            "carflavor_batch_photos",
            "Photos that went through the network together.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self._registry,
        )
        self.pending = prometheus_client.Gauge(
            "carflavor_pending_requests",
            "Requests that are read, wait or are being answered.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )

    def render(self):
        """Returns the metrics of all worker processes in Prometheus's text form, as bytes."""
        if METRICS_VARIABLE not in os.environ:
            return prometheus_client.generate_latest(self._registry)
        _forget_dead_processes(Path(os.environ[METRICS_VARIABLE]))
        registry = prometheus_client.CollectorRegistry()
        prometheus_client.multiprocess.MultiProcessCollector(registry)
        return prometheus_client.generate_latest(registry)


def _forget_dead_processes(folder):
    # A worker that was killed has requests pending for ever.
    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            prometheus_client.multiprocess.mark_process_dead(pid)
