import threading
import time

import numpy as np
import pytest

from carflavor.serving.batching import BatchingEngine


class CountingEngine:
    """Answers each photo with its first value, and holds a batch back until it is let go."""

    name, precision, input_size = "counting", "float32", 1

    def __init__(self):
        self.batches = []
        self.answer = self._answer
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def __call__(self, photos):
        return self.answer(photos)

    def _answer(self, photos):
        self.batches.append(photos[:, 0, 0, 0].tolist())
        self.begun.release()
        assert self.go_on.acquire(timeout=30)
        if 255 in self.batches[-1]:
            raise ValueError("no such photo")
        return np.repeat(photos[:, 0, 0, :1].astype(np.float32), 2, axis=1)


def square(*values):
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)


@pytest.fixture
def engine():
    return CountingEngine()


@pytest.fixture
def calls():
    """Calls in threads of their own, and what came of each."""
    answers, threads = {}, []

    def call(batching, *values):
        def ask():
            try:
                answers[values] = batching(square(*values)).tolist()
            except ValueError as error:
                answers[values] = str(error)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        # In this order, so that the test knows which batch each is in.
        deadline = time.monotonic() + 10
        while not (batching._waiting.qsize() or values[0] in sum(batching._engine.batches, [])):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def finish():
        for thread in threads:
            thread.join(30)
        return answers

    call.finish = finish
    return call


def test_a_photo_goes_at_once_and_those_that_came_meanwhile_go_together(engine, calls):
    sizes = []
    batching = BatchingEngine(engine, sizes.append, largest_batch=4)
    calls(batching, 1)
    assert engine.begun.acquire(timeout=10)
    for value in (2, 3, 4, 5, 6):
        calls(batching, value)
        while batching._waiting.qsize() < value - 1:
            time.sleep(0.001)
    engine.go_on.release(10)
    assert calls.finish() == {(value,): [[value, value]] for value in range(1, 7)}
    assert [len(batch) for batch in engine.batches] == [1, 4, 1]
    assert engine.batches[1] == [2, 3, 4, 5]
    assert sizes == [1, 4, 1]
    assert time.monotonic() - batching.last_answer < 30


def test_a_caller_with_many_photos_is_not_split_and_does_not_overfill_a_batch(engine, calls):
    batching = BatchingEngine(engine, lambda size: None, largest_batch=4)
    calls(batching, 1)
    assert engine.begun.acquire(timeout=10)
    waiting = 0
    for values in ((2, 3), (4, 5, 6), (7, 8, 9, 10, 11), (12,)):
        calls(batching, *values)
        waiting += 1
        while batching._waiting.qsize() < waiting:
            time.sleep(0.001)
    engine.go_on.release(10)
    answers = calls.finish()
    assert engine.batches == [[1], [2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12]]
    assert answers[(7, 8, 9, 10, 11)] == [[value, value] for value in range(7, 12)]


def test_an_error_reaches_those_of_its_batch_and_the_next_batch_is_answered(engine, calls):
    batching = BatchingEngine(engine, lambda size: None, largest_batch=4)
    engine.go_on.release(10)
    calls(batching, 255)
    assert calls.finish() == {(255,): "no such photo"}
    before = batching.last_answer
    calls(batching, 7)
    assert calls.finish()[(7,)] == [[7, 7]]
    assert before == 0 and batching.last_answer > 0


def test_who_no_longer_waits_is_left_out_and_the_others_are_answered(engine, calls):
    batching = BatchingEngine(engine, lambda size: None, largest_batch=4)
    computed = batching.submit(square(1))
    assert engine.begun.acquire(timeout=10)
    waiting = batching.submit(square(2))
    assert not computed.cancel()
    assert waiting.cancel()
    calls(batching, 3)
    engine.go_on.release(10)
    assert calls.finish() == {(3,): [[3, 3]]}
    assert computed.result(timeout=10).tolist() == [[1, 1]]
    assert engine.batches == [[1], [3]]


@pytest.mark.parametrize("answer", [np.full((1, 2), np.nan, np.float32), np.zeros((0, 2), np.float32)])
def test_an_answer_that_is_no_probability_is_an_error_and_the_next_one_is_given(engine, answer):
    answers = [answer, np.ones((1, 2), np.float32)]
    engine.answer = lambda photos: answers.pop(0)
    batching = BatchingEngine(engine, lambda size: None, largest_batch=4)
    with pytest.raises(ArithmeticError, match="^the network has answered 1 photos with what is no probability$"):
        batching(square(1))
    assert batching(square(1)).tolist() == [[1, 1]]


def test_it_is_an_engine_like_the_one_it_calls(engine):
    batching = BatchingEngine(engine, lambda size: None)
    assert (batching.name, batching.precision, batching.input_size) == ("counting", "float32", 1)
