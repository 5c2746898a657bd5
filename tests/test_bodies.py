import json

import pytest

from carflavor.serving.bodies import check_body


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        ({"dataframe_records": [{"image": "YQ=="}]}, 1),
        ({"dataframe_records": [{"image": "YQ==", "x1": 1, "y1": 2, "x2": 3, "y2": 4}, {"image": None}]}, 2),
        ({"dataframe_split": {"columns": ["image"], "data": [["YQ=="], ["YQ=="], ["YQ=="]]}}, 3),
        ({"inputs": [{"image": "YQ=="}]}, 1),
        ({"inputs": {"image": ["YQ==", "YQ=="], "x1": [1, None]}}, 2),
        ({"instances": [{"image": "data:image/jpeg;base64,YQ=="}], "params": {"top_k": 1}}, 1),
        ({"dataframe_records": [{"image": "YQ=="}], "params": None}, 1),
        ({"dataframe_records": [{"image": "YQ=="}], "Größe": 1}, 1),
    ],
)
def test_bodies_that_may_pass(body, rows):
    assert check_body(json.dumps(body, ensure_ascii=False).encode(), 4).rows == rows


def test_base64_as_dotnet_and_php_write_it():
    body = '{"inputs": [{"image": "\\u002B\\/' + "A" * 1_000_000 + '"}]}'
    assert check_body(body.encode(), 4).records[0]["image"][:3] == "+/A"


ROWS = 'expected {} to be a list of rows such as {{"image": "<base64>"}}'
FORMS = "expected a JSON object with one of dataframe_records, dataframe_split, inputs, instances, got "


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a JSON object, got a body that is no JSON: Expecting value at 0"),
        (b'{"inputs": ', "expected a JSON object, got a body that is no JSON: Expecting value at 11"),
        (b"\xff\xd8\xff\xe0", "expected a JSON object in UTF-8, got a body in another encoding"),
        ('{"inputs": []}'.encode("utf-16"), "expected a JSON object in UTF-8, got a body in another encoding"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", "expected numbers of at most 4,300 digits, got a longer one"),
        (b"[" * 1100, "expected a JSON object of rows, got lists or objects nested a thousand deep"),
        (b'{"a":' * 1100, "expected a JSON object of rows, got lists or objects nested a thousand deep"),
        ([], FORMS + "a list"),
        ("text", FORMS + "a text"),
        (5, FORMS + "a number"),
        (True, FORMS + "a truth value"),
        (None, FORMS + "null"),
        ({}, FORMS + "none of them"),
        ({"image": "YQ=="}, FORMS + "none of them"),
        ({"inputs": [], "instances": []}, FORMS + "inputs and instances"),
        ({"inputs": [{"image": "YQ=="}], "params": [1]}, "expected params to be a JSON object, got a list"),
        ({"inputs": [{"image": "YQ=="}], "params": "top_k"}, "expected params to be a JSON object, got a text"),
        ({"inputs": "YQ=="}, ROWS.format("inputs")),
        ({"inputs": ["YQ=="]}, ROWS.format("inputs")),
        ({"instances": [[1]]}, ROWS.format("instances")),
        ({"dataframe_records": {"image": ["YQ=="]}}, ROWS.format("dataframe_records")),
        ({"inputs": {"image": "YQ=="}}, "expected inputs to be a list of rows, or an object of columns of one length"),
        (
            {"inputs": {"image": ["YQ=="], "x1": [1, 2]}},
            "expected inputs to be a list of rows, or an object of columns of one length",
        ),
        ({"inputs": {}}, "expected inputs to be a list of rows, or an object of columns of one length"),
        ({"dataframe_split": []}, "expected dataframe_split to be an object with columns and data"),
        ({"dataframe_split": {"data": []}}, "expected dataframe_split to be an object with columns and data"),
        (
            {"dataframe_split": {"columns": "image", "data": []}},
            "expected columns of dataframe_split to be a list of names",
        ),
        (
            {"dataframe_split": {"columns": [["image"]], "data": []}},
            "expected columns of dataframe_split to be a list of names",
        ),
        (
            {"dataframe_split": {"columns": ["image"], "data": [["YQ==", 1]]}},
            "expected data of dataframe_split to be a list of rows of 1 values each",
        ),
        (
            {"dataframe_split": {"columns": ["image"], "data": ["YQ=="]}},
            "expected data of dataframe_split to be a list of rows of 1 values each",
        ),
        ({"dataframe_records": []}, "expected at least one photo, got none"),
        ({"inputs": {"image": []}}, "expected at least one photo, got none"),
        ({"dataframe_records": [{}] * 5}, "expected at most 4 photos in a request, got 5"),
        (
            {"dataframe_records": [{}] * 5000},
            "expected at most 4 photos in a request, got a body of 10,001 values or more",
        ),
        (
            '{"inputs": "' + "é" * 600_000 + '"}',
            "expected a body of ASCII characters where it has more than 1,000,000 bytes",
        ),
        (
            '{"inputs": "\\ud83d\\ude00' + "A" * 1_000_000 + '"}',
            "expected a body of ASCII characters where it has more than 1,000,000 bytes",
        ),
    ],
)
def test_bodies_that_are_refused(body, message):
    if isinstance(body, str) and body.startswith("{"):
        body = body.encode()
    with pytest.raises(ValueError) as error:
        check_body(body if isinstance(body, bytes) else json.dumps(body).encode(), 4)
    assert str(error.value) == message
