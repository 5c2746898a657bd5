import pytest

from carflavor.data.journal import Journal


def test_entries_are_there_when_it_is_opened_again(tmp_path):
    with Journal(tmp_path / "journal", {"size": 256}) as journal:
        assert (journal.is_other, journal.entries) == (False, [])
        journal.add([{"row": 1}, {"row": 2, "error": "größer\nals erwartet"}])
        # Before it is closed: a process that is killed closes nothing.
        with Journal(tmp_path / "journal", {"size": 256}) as again:
            assert again.is_other is False
            assert again.entries == journal.entries == [{"row": 1}, {"row": 2, "error": "größer\nals erwartet"}]


@pytest.mark.parametrize("torn", ['{"row": 3', '{"row": 3}', "", '{"ro\n{"row": 4}\n'])
def test_a_torn_line_and_what_follows_is_thrown_away(tmp_path, torn):
    path = tmp_path / "journal"
    path.write_text('{"size": 256}\n{"row": 1}\n' + torn)
    with Journal(path, {"size": 256}) as journal:
        assert journal.entries == [{"row": 1}]
        journal.add([{"row": 5}])
    assert path.read_text() == '{"size": 256}\n{"row": 1}\n{"row": 5}\n'


def test_entries_of_other_work_are_thrown_away(tmp_path):
    with Journal(tmp_path / "journal", {"size": 256, "crops": ("box",)}) as journal:
        journal.add([{"row": 1}])
    with Journal(tmp_path / "journal", {"size": 256, "crops": ("box",)}) as journal:
        assert (journal.is_other, journal.entries) == (False, [{"row": 1}])
    with Journal(tmp_path / "journal", {"size": 128, "crops": ("box",)}) as journal:
        assert (journal.is_other, journal.entries) == (True, [])
    assert (tmp_path / "journal").read_text() == '{"size": 128, "crops": ["box"]}\n'


@pytest.mark.parametrize("content", ["", "{", "no journal", "\0\0\0"])
def test_a_file_without_a_whole_first_line_is_begun_anew(tmp_path, content):
    (tmp_path / "journal").write_text(content)
    with Journal(tmp_path / "journal", {"size": 1}) as journal:
        assert (journal.is_other, journal.entries) == (False, [])
    assert (tmp_path / "journal").read_text() == '{"size": 1}\n'
