"""Results files: cut anywhere, damaged, foreign, in use; nothing that was written is lost."""

from __future__ import annotations

import pytest

from sievit.accel.explore.results_file import Journal, as_line, from_line

RECORDS = [
    {"key": f"k{number}", "figures": {"seconds": number / 3, "text": 'a "quoted", check'}}
    for number in range(4)
]


def _written(path, records=RECORDS):
    with Journal(path) as journal:
        for record in records:
            journal.append(record)
    return path.read_bytes()


def test_lines_come_back_exactly(tmp_path):
    path = tmp_path / "deep" / "r.jsonl"
    text = _written(path)
    assert text.count(b"\n") == 4
    with Journal(path) as journal:
        assert list(journal.known.values()) == RECORDS
    assert path.read_bytes() == text


def test_a_line_is_in_the_file_at_once(tmp_path):
    path = tmp_path / "r.jsonl"
    with Journal(path) as journal:
        for number, record in enumerate(RECORDS, 1):
            journal.append(record)
            assert path.read_bytes().count(b"\n") == number


def test_cut_at_every_byte_of_the_last_lines(tmp_path, recwarn):
    path = tmp_path / "r.jsonl"
    text = _written(path)
    ends = [index + 1 for index, byte in enumerate(text) if byte == ord("\n")]
    for cut in range(ends[1], len(text)):
        path.write_bytes(text[:cut])
        whole = sum(end <= cut + 1 for end in ends)  # a line that lacks only its end is whole
        with Journal(path) as journal:
            assert list(journal.known.values()) == RECORDS[:whole], cut
            for record in RECORDS[whole:]:
                journal.append(record)
        assert path.read_bytes() == text, cut
    said = [w for w in recwarn if "r.jsonl" in str(w.message)]  # others may collect garbage here
    assert not said, said[0].message
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_damage_is_kept_aside_and_said(tmp_path, place):
    path = tmp_path / "r.jsonl"
    text = _written(path)
    lines = text.splitlines(keepends=True)
    number = {"first": 0, "middle": 1, "last": 3}[place]
    lines[number] = lines[number].replace(b'"seconds": ', b'"seconds": 7')  # still JSON
    damaged = b"".join(lines)
    for again in (1, 2):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match=rf"line {number + 1}.*r.jsonl.damaged-{again}"):
            journal = Journal(path)
        with journal:
            kept = [record for index, record in enumerate(RECORDS) if index != number]
            assert list(journal.known.values()) == kept
            journal.append(RECORDS[number])
        assert (tmp_path / f"r.jsonl.damaged-{again}").read_bytes() == damaged
    with Journal(path) as journal:
        assert len(journal.known) == 4


def test_every_flipped_bit_is_noticed():
    line = as_line(RECORDS[1])
    assert from_line(line) == RECORDS[1]
    for index in range(len(line) - 1):
        for bit in range(8):
            flipped = bytearray(line)
            flipped[index] ^= 1 << bit
            assert from_line(bytes(flipped)) is None, (index, bit)


def test_noise_after_whole_lines_is_damage(tmp_path):
    path = tmp_path / "r.jsonl"
    text = _written(path)
    path.write_bytes(text + b"\x00\x00\x00")
    with pytest.warns(UserWarning, match="damaged"):
        Journal(path).__exit__()
    assert path.read_bytes() == text


@pytest.mark.parametrize("text", [b"lines = 3\n", b"\x00\x01", b"[1, 2]", b'{"other": 1}\n'])
def test_a_foreign_file_is_left_alone(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_bytes(text)
    with pytest.raises(ValueError, match="something else"):
        Journal(path)
    assert path.read_bytes() == text


def test_one_writer_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "r.jsonl"
    with Journal(path), pytest.raises(ValueError, match="in use"):
        Journal(path)
    with Journal(path) as journal:
        assert journal.known == {}


def test_equal_keys_the_last_counts(tmp_path):
    path = tmp_path / "r.jsonl"
    _written(path, [{"key": "a", "v": 1}, {"key": "b", "v": 2}, {"key": "a", "v": 3}])
    with Journal(path) as journal:
        assert journal.known == {"a": {"key": "a", "v": 3}, "b": {"key": "b", "v": 2}}


def test_a_record_begins_with_its_key(tmp_path):
    with Journal(tmp_path / "r.jsonl") as journal, pytest.raises(ValueError, match="key"):
        journal.append({"v": 1, "key": "a"})
    assert (tmp_path / "r.jsonl").read_bytes() == b""
