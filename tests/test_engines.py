import logging
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from carflavor import engines
from carflavor.engines import IR_FILE, KerasEngine, OpenVinoEngine, convert, load_engine
from carflavor.image import squash


@pytest.fixture(scope="module")
def squares(photos):
    return np.stack([squash(photo, 32) for photo in photos])


@pytest.fixture(scope="module")
def expected(tiny_network, squares):
    return tiny_network.predict_on_batch(squares)


@pytest.fixture(scope="module")
def keras_file(tiny_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("keras") / "model.keras"
    tiny_network.save(path)
    return path


@pytest.fixture(scope="module")
def ir(tiny_network, squares, tmp_path_factory):
    """Folder with the IR of each precision."""
    folder = tmp_path_factory.mktemp("ir")
    for precision in engines.PRECISIONS:
        convert(tiny_network, folder / precision, precision, calibration=squares)
    return folder


@pytest.mark.parametrize("count", [1, 3, 8, 33, 40])
def test_keras_engine_answers_any_batch(keras_file, squares, expected, count):
    engine = KerasEngine(keras_file)
    rows = np.arange(count) % len(squares)
    np.testing.assert_allclose(engine(squares[rows]), expected[rows], atol=1e-5)
    assert (engine.name, engine.precision, engine.input_size) == ("keras", "float32", 32)
    assert engine.sizes_to_prepare(16) == [1, 2, 4, 8, 16]


# bfloat16 has 8 bits of precision, int8 as many levels.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.1)])
def test_openvino_engine_answers_like_keras(ir, squares, expected, precision, tolerance):
    engine = OpenVinoEngine(ir / precision / IR_FILE, precision)
    for count in (8, 1, 3):
        probabilities = engine(squares[:count])
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities, expected[:count], atol=tolerance)
    assert (engine.name, engine.precision, engine.input_size) == ("openvino", precision, 32)
    assert engine.sizes_to_prepare(4) == [1, 2, 3, 4]


def test_normalisation_and_scale_become_part_of_the_convolutions(ir, tiny_network):
    import openvino

    kinds = [op.get_type_name() for op in openvino.Core().read_model(ir / "float32" / IR_FILE).get_ops()]
    assert sum("Scale" in layer.name or "scale" in layer.name for layer in tiny_network.layers) > 1
    assert kinds.count("BatchNormInference") == 0
    # One for the range of the pixels; each Scale that was left would be another one.
    assert kinds.count("Multiply") <= 1


def test_int8_is_quantised(ir):
    text = (ir / "int8" / IR_FILE).read_text()
    assert 'type="FakeQuantize"' in text and 'element_type="i8"' in text
    assert 'type="FakeQuantize"' not in (ir / "float32" / IR_FILE).read_text()


def test_an_answer_stays_when_the_next_one_comes(ir, squares, expected):
    engine = OpenVinoEngine(ir / "float32" / IR_FILE, "float32", threads=1)
    first = engine(squares[:4])
    engine(squares[4:])
    np.testing.assert_allclose(first, expected[:4], atol=1e-5)


def test_threads_take_turns(ir, squares, expected):
    engine = OpenVinoEngine(ir / "float32" / IR_FILE, "float32")
    answers = {}

    def ask(row):
        for _ in range(20):
            answers[row] = engine(squares[row : row + 1])

    threads = [threading.Thread(target=ask, args=[row]) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    np.testing.assert_allclose(np.concatenate([answers[row] for row in range(8)]), expected, atol=1e-5)


def test_openvino_leaves_the_choice_of_cores_to_the_system(ir, clean_environment):
    # By itself it binds threads while they compute, those of every process on a machine to the same cores.
    code = (
        "import contextlib, os, sys, threading, numpy\n"
        "from carflavor.engines import OpenVinoEngine\n"
        "engine = OpenVinoEngine(sys.argv[1], 'float32', threads=1)\n"
        "squares = numpy.zeros((64, 32, 32, 3), 'uint8')\n"
        "thread = threading.Thread(target=lambda: [engine(squares) for _ in range(50)])\n"
        "thread.start()\n"
        "seen = set()\n"
        "while thread.is_alive():\n"
        "    with contextlib.suppress(ProcessLookupError):\n"
        "        seen |= {len(os.sched_getaffinity(int(each))) for each in os.listdir('/proc/self/task')}\n"
        "print(*seen)\n"
    )
    command = [sys.executable, "-c", code, ir / "float32" / IR_FILE]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment, cwd=ir)
    assert (result.returncode, result.stdout) == (0, f"{len(os.sched_getaffinity(0))}\n"), result.stderr


def test_load_engine_takes_the_packed_one_or_another(keras_file, ir):
    packed = {"name": "openvino", "precision": "bfloat16"}
    engine = load_engine(keras_file.parent, ir / "bfloat16", packed)
    assert (engine.name, engine.precision) == ("openvino", "bfloat16")
    assert load_engine(keras_file.parent, ir / "bfloat16", packed, "keras").name == "keras"
    with pytest.raises(ValueError, match="^expected engine to be one of keras, openvino, got 'onnx'$"):
        load_engine(keras_file.parent, ir / "bfloat16", packed, "onnx")
    with pytest.raises(ValueError, match="^expected a model that was packed with engine=openvino, got one without"):
        load_engine(keras_file.parent, ir, {"name": "keras", "precision": "float32"}, "openvino")


@pytest.fixture
def no_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed


def test_without_openvino_a_model_is_refused_or_falls_back_and_says_so(no_openvino, keras_file, ir, caplog):
    packed = {"name": "openvino", "precision": "float32"}
    with pytest.raises(ImportError) as error:
        load_engine(keras_file.parent, ir / "float32", packed)
    assert str(error.value) == (
        "The model was packed for OpenVINO, which is not installed here: pip install openvino. "
        "Or have Keras run it, several times slower: allow_fallback=True or CARFLAVOR_ALLOW_FALLBACK=true"
    )
    with caplog.at_level(logging.WARNING, logger="carflavor"):
        assert load_engine(keras_file.parent, ir / "float32", packed, allow_fallback=True).name == "keras"
    assert "OpenVINO is not installed: Keras runs the model instead, several times slower" in caplog.text


def test_int8_needs_photos(tiny_network, tmp_path):
    with pytest.raises(ValueError, match="^expected photos of the training split to quantise with, got none$"):
        convert(tiny_network, tmp_path / "engine", "int8")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("engine", "precision", "message"),
    [
        ("onnx", "float32", "Expected engine to be one of keras, openvino. Received: engine='onnx'"),
        ("keras", "int8", "Expected precision to be one of float32 with engine=keras. Received: precision='int8'"),
        ("openvino", "f16", "with engine=openvino. Received: precision='f16'"),
    ],
)
def test_unknown_engines_and_precisions_are_refused(engine, precision, message):
    with pytest.raises(ValueError) as error:
        engines.check(engine, precision)
    assert str(error.value).endswith(message)


def test_openvino_is_imported_without_what_reports_to_google(ir, clean_environment):
    code = f"""
import sys
from carflavor.engines import OpenVinoEngine
OpenVinoEngine({str(ir / "float32" / IR_FILE)!r}, "float32")
print([name for name in sys.modules if name.startswith(("openvino_telemetry", "tensorflow", "keras", "nncf"))])
"""
    process = subprocess.run([sys.executable, "-c", code], env=clean_environment, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1:] == ["[]"], process.stderr
