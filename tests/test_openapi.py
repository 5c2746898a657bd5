"""The server, driven by schemathesis from its own OpenAPI document.

    pip install schemathesis
    cd tests && schemathesis run http://127.0.0.1:5001/openapi.json --checks all --max-examples 2000

is the long form.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from servers import carflavor_server, request

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server(openvino_model, tmp_path_factory, clean_environment):
    with carflavor_server(openvino_model, tmp_path_factory.mktemp("server"), clean_environment) as server:
        yield server


def test_the_document_has_a_request_that_is_answered(server):
    status, text, _ = request(f"{server.url}/openapi.json")
    document = json.loads(text)
    assert (status, document["openapi"], document["info"]["title"]) == (200, "3.1.0", "carflavor")
    assert set(document["paths"]) == {"/invocations", "/health", "/ping", "/metrics", "/version"}
    content = document["paths"]["/invocations"]["post"]["requestBody"]["content"]["application/json"]
    status, text, _ = request(f"{server.url}/invocations", content["examples"]["one photo"]["value"])
    assert (status, len(json.loads(text)["predictions"][0]["top_k"])) == (200, 2)


def test_the_server_does_what_its_document_says(server, clean_environment):
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", "all"]
    command += ["--max-examples", "100", "--seed", "0", "--generation-database", "none", "--no-color"]
    done = subprocess.run(command, cwd=HERE, env=clean_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout
