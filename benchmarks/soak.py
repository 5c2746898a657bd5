"""Whether a served model stands good and bad callers for long: no error for the good ones, no growing memory.

    python benchmarks/soak.py --model models:/cars@champion --minutes 30 --clients 64

Real server, real HTTP: clients send one request after another, of which one in seven is bad (no photo, no base64, no
JSON, a bomb, a wrong type), one in forty has several photos and one in forty a photo of 12 megapixels; besides, callers
come and go in the middle of a request, five a second. At the end the server gets SIGTERM under this load.

The last line is JSON: `good_errors` (answers to good requests that are no 200; a 503 is one), `bad_wrong` (bad requests
that were not answered by 400), `growth_percent` (memory at the end over that after the first minute), and after SIGTERM
`lost`: requests that the server says it has answered less those whose answers arrived, and `exit_code`.
"""

import base64
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from statistics import median

import click
import cv2
import numpy as np
from load import percentile, run_load
from measuring import Server, describe_machine, find_free_port

from carflavor.data.drawing import CLASS_NAMES, draw_photo
from carflavor.data.example import example_photo
from carflavor.image import encode_jpeg

_SECONDS_A_ROUND = 30
_SEED = 0
_LEAVERS_A_SECOND = 5


def build_requests():
    """Returns lists of bodies: good ones, which are to be answered by 200, and bad ones, by 400."""
    drawn = [draw_photo(index % len(CLASS_NAMES), np.random.default_rng([_SEED, index])) for index in range(20)]
    photos = [encode_jpeg(photo) for photo, _ in drawn]
    photos += [cv2.imencode(extension, drawn[0][0])[1].tobytes() for extension in (".png", ".webp", ".bmp", ".tiff")]
    texts = [base64.b64encode(photo).decode() for photo in photos]
    rows = [{"image": text} for text in texts]
    rows += [
        {"image": text} | dict(zip(("x1", "y1", "x2", "y2"), map(float, box), strict=True))
        for text, (_, box) in zip(texts, drawn, strict=False)
    ]
    rows += [{"image": f"data:image/jpeg;base64,{text}"} for text in texts[:4]]
    good = [{"dataframe_records": [row]} for row in rows]
    good += [{"inputs": [row], "params": {"top_k": 2}} for row in rows[:6]]
    good += [{"dataframe_split": {"columns": list(row), "data": [list(row.values())]}} for row in rows[18:30]]
    good += [{"instances": rows[start : start + 6], "params": {"on_error": "report"}} for start in (0, 10)]
    large = cv2.resize(drawn[0][0], (4000, 3000))
    good += [{"inputs": {"image": [base64.b64encode(encode_jpeg(large, 60)).decode()]}}] * 2
    bomb = photos[20][:16] + (50_000).to_bytes(4, "big") * 2 + photos[20][24:]
    bad = ["", "no photo", "!" * 500, None, 5, [1], texts[0][:-400], base64.b64encode(bomb).decode(), "None"]
    bad = [{"dataframe_records": [{"image": value}]} for value in bad]
    bad += [{"inputs": [rows[0]], "params": {"top_k": 0}}, {"nonsense": 1}, {"inputs": [{"x1": 1}]}]
    return [json.dumps(body).encode() for body in good], [
        *(json.dumps(body).encode() for body in bad),
        b"{",
        b"[" * 5000,
    ]


def mix(good, bad):
    """Returns bodies in random order, a bad one in seven, and the set of indices of the good ones."""
    draw = random.Random(_SEED)
    bodies = [(draw.choice(bad), False) if draw.random() < 1 / 7 else (draw.choice(good), True) for _ in range(700)]
    return [body for body, _ in bodies], {index for index, (_, is_good) in enumerate(bodies) if is_good}


def soak(model, minutes, clients, say):
    """Serves a model under load.

    Args:
        model: Path or URI.
        minutes: For how long; at least a half.
        clients: Number of clients.
        say: Function that is called with a line on what happens.

    Returns:
        Dict of what the last line has.
    """
    bodies, good = mix(*build_requests())
    url = f"http://127.0.0.1:{(port := find_free_port())}"
    command = [sys.executable, "-m", "carflavor.server", "--model", model, "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        server = Server("carflavor.server", command, {}, url, folder)
        stop = threading.Event()
        leavers = threading.Thread(target=come_and_go, args=(port, stop))
        try:
            server.wait_until_healthy()
            leavers.start()
            statuses, seconds, memory = Counter(), [], []
            rounds = max(round(60 * minutes / _SECONDS_A_ROUND), 1)
            for turn in range(rounds):
                answers = run_load(f"{url}/invocations", bodies, clients, _SECONDS_A_ROUND)
                statuses.update((answer.body in good, answer.status, answer.error) for answer in answers)
                in_time = sorted(answer.seconds for answer in answers if answer.status == 200)
                seconds.append([percentile(in_time, percent) for percent in (50, 95, 99)])
                memory.append(server.memory() / 1e6)
                say(f"{turn + 1} of {rounds}: {len(answers)} answers, {memory[-1]:.0f} MB, {dict(statuses)}")
            # Those who come and go do not wait for an answer that the server counts.
            stop.set()
            leavers.join()
            after = end_under_load(server, url, bodies, clients)
        finally:
            stop.set()
            if leavers.ident:
                leavers.join()
            server.close()
    first = memory[min(60 // _SECONDS_A_ROUND, len(memory)) - 1]
    p50, p95, p99 = (round(1000 * median(column), 1) for column in zip(*seconds, strict=True))
    return {
        "good_errors": sum(count for (is_good, status, _), count in statuses.items() if is_good and status != 200),
        "bad_wrong": sum(count for (is_good, status, _), count in statuses.items() if not is_good and status != 400),
        "growth_percent": round(100 * (memory[-1] / first - 1), 2),
        **after,
        "answers": {
            f"{'good' if is_good else 'bad'} {status} {error}".strip(): count
            for (is_good, status, error), count in sorted(statuses.items())
        },
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "memory_mb": [round(value) for value in memory],
        "minutes": minutes,
        "clients": clients,
    }


def come_and_go(port, stop):
    """Sends parts of requests and hangs up, until it is told to stop."""
    photo = example_photo()[0]
    body = json.dumps({"inputs": [{"image": base64.b64encode(photo).decode()}]}).encode()
    head = "POST /invocations HTTP/1.1\r\nHost: cars\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    draw = random.Random(_SEED)
    while not stop.wait(1 / _LEAVERS_A_SECOND):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(request[: draw.randrange(1, len(request) + 1)])
        except OSError:
            return  # the server has ended


def end_under_load(server, url, bodies, clients):
    """Ends a server while clients send; returns what was lost and the exit code."""
    answered_before = count_answered(server)
    answers = []
    load = threading.Thread(target=lambda: answers.extend(run_load(f"{url}/invocations", bodies, clients, 6)))
    load.start()
    time.sleep(2)
    exit_code = server.end()
    load.join()
    arrived = sum(answer.status > 0 for answer in answers)
    return {"lost": count_answered(server) - answered_before - arrived, "exit_code": exit_code}


def count_answered(server):
    """Returns how many requests a server says that it has answered to one who waited for it."""
    events = (json.loads(line) for line in server.read_log(sys.maxsize).splitlines() if line.startswith("{"))
    return sum(event["event"] == "request" and event["status"] != 499 for event in events)


@click.command()
@click.option("--model", required=True, help="Packed model as path, runs:/... or models:/...")
@click.option("--minutes", default=30.0, show_default=True, type=click.FloatRange(0.5))
@click.option("--clients", default=64, show_default=True, type=click.IntRange(1))
def main(model, minutes, clients):
    """Measures what long mixed load does to a server."""
    figures = soak(model, minutes, clients, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(figures | {"machine": describe_machine()}))


if __name__ == "__main__":
    main()
