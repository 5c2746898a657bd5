"""Whether the body of a request may go to MLflow's parser: its form, and how much memory parsing it can take."""

import contextlib
import json
import re
from dataclasses import dataclass

from carflavor.scoring import BOX_COLUMNS

_COLUMNS = ("image", *BOX_COLUMNS)
FORMS = ("dataframe_records", "dataframe_split", "inputs", "instances")
# `[],` is 3 bytes in a body and 64 as a Python list: what is counted is not the length of a body but its brackets and
# commas, of which a row of a photo, a box and more has few. A photo in base64 has none.
_MARKS_PER_ROW = 64
_MARKS_BESIDE_ROWS = 1024
# One character beyond Latin-1 makes each character of a text take two or four bytes. Photos in base64 have none.
_LARGEST_NOT_ASCII = 1_000_000
# What an escape makes of them; \u002B, as .NET writes a plus, is none.
_ESCAPE = re.compile(rb"\\u(?!00)")


@dataclass(frozen=True)
class Body:
    """A body that was checked.

    Attributes:
        records: List of rows, dicts; of columns only those that a model knows.
        params: Dict of parameters.
    """

    records: list
    params: dict

    @property
    def rows(self):
        """How many there are."""
        return len(self.records)

    def single_photo(self):
        """Returns the text and the box, or None, of a body with one photo and nothing unusual; else None for both."""
        row = self.records[0]
        if len(self.records) > 1 or type(row.get("image")) is not str:
            return None, None
        if len(row) == 1:
            return row["image"], None
        if len(row) == len(_COLUMNS) and all(type(row[name]) in (int, float) for name in BOX_COLUMNS):
            with contextlib.suppress(OverflowError):  # of a number of 400 digits
                return row["image"], [float(row[name]) for name in BOX_COLUMNS]
        return None, None

    def as_request(self):
        """Returns the request, a dict, as MLflow takes it with the least memory.

        Of columns and of `instances`, it makes arrays in which each text has the room of the longest one: one photo of
        15 MB and 255 small ones would take 20 GB. Columns that it does not know would be named in an error and in the
        log, and fields of requests to language models have it read the others in another way.
        """
        return {"dataframe_records": self.records, "params": self.params}


def check_body(body, most_rows):
    """Checks that a body is a JSON object in one of MLflow's four forms with no more rows than there may be.

    What each row holds is left to MLflow and to the model.

    Args:
        body: Bytes.
        most_rows: Rows that there may be.

    Returns:
        `Body`.

    Raises:
        ValueError: If it is anything else, with a sentence that repeats nothing of the body but names of fields.
    """
    if len(body) > _LARGEST_NOT_ASCII and (not body.isascii() or _ESCAPE.search(body)):
        raise ValueError(f"expected a body of ASCII characters where it has more than {_LARGEST_NOT_ASCII:,} bytes")
    marks = body.count(b"[") + body.count(b"{") + body.count(b",")
    if marks > _MARKS_PER_ROW * most_rows + _MARKS_BESIDE_ROWS:
        raise ValueError(f"expected at most {most_rows:,} photos in a request, got a body of {marks:,} values or more")
    try:
        # Not json.loads: of bytes, that would also take UTF-16.
        request = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("expected a JSON object in UTF-8, got a body in another encoding") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON object, got a body that is no JSON: {error.msg} at {error.pos}") from None
    except RecursionError:
        raise ValueError("expected a JSON object of rows, got lists or objects nested a thousand deep") from None
    except ValueError:
        raise ValueError("expected numbers of at most 4,300 digits, got a longer one") from None
    if not isinstance(request, dict):
        raise ValueError(f"expected a JSON object with one of {', '.join(FORMS)}, got {_kind(request)}")
    forms = [form for form in FORMS if form in request]
    if len(forms) != 1:
        got = " and ".join(forms) or "none of them"
        raise ValueError(f"expected a JSON object with one of {', '.join(FORMS)}, got {got}")
    if not isinstance(request.get("params"), dict | None):
        raise ValueError(f"expected params to be a JSON object, got {_kind(request['params'])}")
    rows = _read_rows(forms[0], request[forms[0]])
    if not rows:
        raise ValueError("expected at least one photo, got none")
    if len(rows) > most_rows:
        raise ValueError(f"expected at most {most_rows:,} photos in a request, got {len(rows):,}")
    records = [{name: row[name] for name in _COLUMNS if name in row} for row in rows]
    return Body(records, request.get("params") or {})


def _read_rows(form, content):
    if form == "dataframe_split":
        if not isinstance(content, dict) or not {"columns", "data"} <= set(content):
            raise ValueError("expected dataframe_split to be an object with columns and data")
        columns, content = content["columns"], content["data"]
        if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
            raise ValueError("expected columns of dataframe_split to be a list of names")
        if not isinstance(content, list) or not all(
            isinstance(row, list) and len(row) == len(columns) for row in content
        ):
            raise ValueError(f"expected data of dataframe_split to be a list of rows of {len(columns)} values each")
        if twice := [name for name in _COLUMNS if columns.count(name) > 1]:
            raise ValueError(f"expected each column once, got {twice[0]} more than once")
        return [dict(zip(columns, row, strict=True)) for row in content]
    elif form != "dataframe_records" and isinstance(content, dict):
        # A column a field.
        lengths = {len(column) for column in content.values() if isinstance(column, list)}
        if len(lengths) != 1 or not all(isinstance(column, list) for column in content.values()):
            raise ValueError(f"expected {form} to be a list of rows, or an object of columns of one length")
        return [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
    elif not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f'expected {form} to be a list of rows such as {{"image": "<base64>"}}')
    return content


def _kind(value):
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")
