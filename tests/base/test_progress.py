"""Batches whose results are kept: a run that was killed at any byte ends with the same lines."""

import json

import pytest

from medvl.base.progress import read_finished_lines, run_batches

BATCHES = [[3, 1], [0], [2, 4]]
LINES = [{"row": row, "answer": f"röw {row}"} for batch in BATCHES for row in batch]


class Work:
    """A line for each row; remembers the batches it was given."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(list(batch))
        return [{"answer": f"röw {row}"} for row in batch]


def test_lines_are_those_of_work(tmp_path):
    work = Work()
    path = tmp_path / "below" / "answers.jsonl"
    assert run_batches(path, BATCHES, work) == LINES
    assert work.batches == BATCHES
    assert path.read_text() == "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES)


def test_a_finished_file_is_only_read(tmp_path):
    path = tmp_path / "answers.jsonl"
    run_batches(path, BATCHES, Work())
    again = Work()
    assert run_batches(path, BATCHES, again) == LINES
    assert again.batches == []


def test_killed_at_any_byte_it_ends_with_the_same_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    run_batches(path, BATCHES, Work())
    whole = path.read_bytes()
    ends = [0]  # of the batches, in bytes
    for batch in BATCHES:
        start = ends[-1]
        for _ in batch:
            start = whole.index(b"\n", start) + 1
        ends.append(start)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        work = Work()
        assert run_batches(path, BATCHES, work) == LINES
        assert path.read_bytes() == whole
        # A batch of which a line is missing is computed again whole.
        finished = sum(end <= size for end in ends[1:])
        assert work.batches == BATCHES[finished:]


def test_an_error_in_work_keeps_the_batches_before(tmp_path):
    path = tmp_path / "answers.jsonl"

    def fails(batch):
        if 0 in batch:
            raise KeyError("stop")
        return [{"answer": f"röw {row}"} for row in batch]

    with pytest.raises(KeyError, match="stop"):
        run_batches(path, BATCHES, fails)
    work = Work()
    assert run_batches(path, BATCHES, work) == LINES
    assert work.batches == BATCHES[1:]


def test_no_batches_are_an_empty_file(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert run_batches(path, [], Work()) == []
    assert path.read_bytes() == b""


def test_text_that_no_file_can_hold_is_escaped(tmp_path):
    path = tmp_path / "answers.jsonl"
    run_batches(path, [[0]], lambda batch: [{"answer": "\ud800"}])
    assert path.read_bytes() == b'{"row": 0, "answer": "\\ud800"}\n'
    assert run_batches(path, [[0]], Work()) == [{"row": 0, "answer": "\ud800"}]


def test_work_must_give_a_line_for_each_row(tmp_path):
    with pytest.raises(ValueError, match="run_batches: work must give a line for each of 2 rows, got 1"):
        run_batches(tmp_path / "answers.jsonl", BATCHES, lambda batch: [{}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json\n", r"line 1: not a line of results \(.*\); remove the file to start again"),
        ('{"row": 3}\n' + "[" * 10**5 + "\n", "line 2: not a line of results"),
        ('{"row": 1}\n', "line 1: results of other rows, or in another order; remove the file"),
        ("[3]\n", "line 1: results of other rows"),
        ("".join(f'{{"row": {row}}}\n' for row in (3, 1, 0, 2, 4, 5)), "line 6: results of other rows"),
    ],
)
def test_other_results_are_refused_and_left_as_they_are(tmp_path, text, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        run_batches(path, BATCHES, Work())
    assert path.read_text() == text


def test_offsets_are_where_lines_begin(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes('{"row": 7}\n{"row": 5, "a": "ü"}\n{"row": 6'.encode())
    lines, offsets = read_finished_lines(path, [7, 5, 6])
    assert lines == [{"row": 7}, {"row": 5, "a": "ü"}]
    assert [path.read_bytes()[at : at + 9] for at in offsets] == [b'{"row": 7', b'{"row": 5', b'{"row": 6']
    assert read_finished_lines(tmp_path / "none", [1]) == ([], [0])
