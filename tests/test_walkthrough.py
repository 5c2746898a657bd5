"""The walkthrough as it is committed, and what tells whether it may be. The .ci/run script executes it."""

import re

import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook, new_output
from walkthrough import PATH, clean, execute, find_faults, list_kinds, read


def test_the_notebook_may_be_committed():
    assert find_faults(read(), PATH.stat().st_size) == []


def first_output(notebook):
    return next(cell.outputs for cell in notebook.cells if cell.get("outputs"))


def add_text(notebook, text):
    first_output(notebook).append(new_output("stream", name="stdout", text=text))


def run_anew(notebook):
    notebook.cells[2].execution_count = 7


def leave_out_a_cell(notebook):
    notebook.cells[2].execution_count = None


def fail(notebook):
    first_output(notebook).append(new_output("error", ename="ValueError", evalue="no", traceback=[]))


def warn(notebook):
    first_output(notebook).append(new_output("stream", name="stderr", text="train: 100%"))


def take_a_picture_away(notebook):
    pictured = [
        cell for cell in notebook.cells if any("image/jpeg" in o.get("data", {}) for o in cell.get("outputs", []))
    ]
    pictured[0].outputs = []


def edit(notebook):
    notebook.cells[0].metadata["collapsed"] = True


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (run_anew, "expected cells that were run once, from the first to the last"),
        (leave_out_a_cell, "expected cells that were run once, from the first to the last"),
        (fail, "expected no error among the outputs"),
        (warn, "expected no standard error among the outputs"),
        (take_a_picture_away, "expected 8 pictures, got 7"),
        (edit, "expected no metadata of an editor"),
        (
            lambda notebook: add_text(notebook, "Record files: /tmp/walkthrough-1/records"),
            "expected nothing of one machine, got /tmp",
        ),
        (lambda notebook: add_text(notebook, "from /Users/me/cars"), "expected nothing of one machine, got /Users"),
        (
            lambda notebook: add_text(notebook, "see https://packages.example"),
            "expected nothing of one machine, got https://",
        ),
        (
            lambda notebook: add_text(notebook, "runs:/" + "0f" * 16 + "/model"),
            "expected nothing of one machine, got " + "0f" * 16,
        ),
    ],
)
def test_a_notebook_that_may_not_be_committed(change, expected):
    notebook = read()
    change(notebook)
    assert find_faults(notebook, 1000) == [expected]


def test_a_notebook_that_is_too_large():
    assert find_faults(read(), 600_001) == ["expected at most 600,000 bytes, got 600,001"]


def test_cleaning_leaves_the_answers():
    cell = new_code_cell("x", metadata={"scrolled": True})
    cell.outputs = [
        new_output("stream", name="stderr", text="epoch 1/6"),
        new_output("execute_result", {"text/plain": "1"}, execution_count=1, metadata={"isolated": True}),
    ]
    notebook = new_notebook(cells=[cell], metadata={"widgets": {}})
    clean(notebook)
    (kept,) = cell.outputs
    assert (kept.data, kept.metadata, cell.metadata) == ({"text/plain": "1"}, {}, {})
    assert list(notebook.metadata) == ["kernelspec", "language_info"]
    assert list_kinds(notebook) == [[["text/plain"]]]


def test_pages_that_it_sends_readers_to():
    links = re.findall(r"\]\(([^)#]+)", "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown"))
    assert len(links) >= 8
    assert [link for link in links if not (PATH.parent / link).is_file()] == []


def test_a_kernel_redraws_bars_and_an_unfinished_walkthrough_fails(tmp_path):
    source = """
from carflavor.progress import progress_bar

with progress_bar("train", 1) as bar, open("interval.txt", "w") as file:
    file.write(str(bar.mininterval))
"""
    notebook = new_notebook(cells=[new_code_cell(source)])
    # The first assertion is about an answer that no cell has asked for.
    with pytest.raises(CellExecutionError) as caught:
        execute(notebook, tmp_path)
    assert (caught.value.ename, caught.value.evalue) == ("NameError", "name 'answer' is not defined")
    assert (tmp_path / "interval.txt").read_text() == "1.0"
