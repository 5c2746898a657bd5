"""Executes docs/walkthrough.ipynb in a kernel, as Jupyter does, and says whether it shows what it should.

    python tests/walkthrough.py [--write]

It takes two to three minutes on two cores. With `--write` the outputs are kept in the file; without it they must be of
the kinds that the file has.
"""

import re
from pathlib import Path

import click
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "walkthrough.ipynb"
MAX_BYTES = 600_000
PICTURES = 8  # photos, curves, three of evaluate, predictions, and those that the server is asked for
_SECONDS = 600  # a cell, on a machine that is busy
# What differs on every machine: absolute paths, URLs of servers other than this one, ids and times.
_PRIVATE = re.compile(r"(?<![\w.:/])/(?:tmp|root|home|var|opt|usr|Users)\b|https?://(?!127\.0\.0\.1)|\b[0-9a-f]{32}\b")
# The names are those of the notebook.
_CHECKS = """
from carflavor.data.drawing import CLASS_NAMES

assert answer["label"][0] in CLASS_NAMES, answer
assert set(answers["label"].dropna()) <= {*CLASS_NAMES, "unknown"}, answers
assert answers["error"].notna().sum() == frame["error"].notna().sum() == 1, answers
assert len(frame) == 160, frame
assert findings["box"].measurement.top_1.value >= 0.85, findings["box"].measurement.top_1
assert findings["full"].measurement.top_1.value >= 0.6, findings["full"].measurement.top_1
assert {"leak", "conflict", "unreadable", "truncated"} <= {row["found"] for row in rows}, rows
assert server.poll() is not None
"""


def read(path=PATH):
    """Returns the notebook, checked against Jupyter's schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook, folder):
    """Executes a copy of a notebook from a folder, and then some assertions on what its cells have made.

    Returns:
        The copy, with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails, or an assertion.
    """
    notebook = nbformat.from_dict({**notebook, "cells": [*notebook.cells, nbformat.v4.new_code_cell(_CHECKS)]})
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.cells.pop()
    return notebook


def clean(notebook):
    """Removes what is of one machine or moment: progress bars and warnings, and what the kernel says of itself."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}


def list_kinds(notebook):
    """Returns what kinds of output each cell has, a list of lists."""
    return [
        [sorted(output.get("data", [output.output_type])) for output in cell.get("outputs", [])]
        for cell in notebook.cells
    ]


def find_faults(notebook, num_bytes):
    """Returns what keeps a notebook from being committed, a list of sentences.

    Args:
        notebook: What `read` returns.
        num_bytes: Size of its file.
    """
    faults = []
    if num_bytes > MAX_BYTES:
        faults.append(f"expected at most {MAX_BYTES:,} bytes, got {num_bytes:,}")
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in codes] != list(range(1, len(codes) + 1)):
        faults.append("expected cells that were run once, from the first to the last")
    outputs = [output for cell in codes for output in cell.outputs]
    if any(output.output_type == "error" for output in outputs):
        faults.append("expected no error among the outputs")
    if any(output.get("name") == "stderr" for output in outputs):
        faults.append("expected no standard error among the outputs")
    data = [output.data for output in outputs if "data" in output]
    pictures = sum("image/jpeg" in each for each in data)
    if pictures != PICTURES:
        faults.append(f"expected {PICTURES} pictures, got {pictures}")
    texts = [output.text for output in outputs if output.output_type == "stream"]
    texts += [text for each in data for kind, text in each.items() if kind.startswith("text/")]
    faults += [f"expected nothing of one machine, got {found[0]}" for text in texts if (found := _PRIVATE.search(text))]
    if notebook.metadata.keys() - {"kernelspec", "language_info"} or any(cell.metadata for cell in notebook.cells):
        faults.append("expected no metadata of an editor")
    return faults


@click.command()
@click.option("--write", is_flag=True, help="Keep the outputs in the file.")
def main(write):
    """Executes the walkthrough from its folder, docs/."""
    committed = read()
    notebook = execute(committed, PATH.parent)
    clean(notebook)
    text = nbformat.writes(notebook) + "\n"
    if faults := find_faults(notebook, len(text.encode())):
        raise click.ClickException("; ".join(faults))
    if write:
        PATH.write_text(text, "utf-8")
    elif list_kinds(committed) != list_kinds(notebook):
        raise click.ClickException(
            "expected the outputs that the cells make, got others: python tests/walkthrough.py --write"
        )
    print(f"{PATH.name}: {len(notebook.cells)} cells, {PICTURES} pictures, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
