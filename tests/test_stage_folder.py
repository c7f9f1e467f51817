"""Folders of numbered parts: what is noticed of parts that were lost or changed, and what a run goes on from."""

import threading
from dataclasses import dataclass

import pytest

from hf_recontrol.data import stage_folder
from hf_recontrol.data.stage_folder import StageFolder, checked_parts, hold_parts, read_manifest

FOUR = 4


def opened(path):
    return StageFolder(path / "stage", "states", {"a": 1}, FOUR, ".txt")


def write(path, text="part", stop_after=FOUR):
    """Write the parts that are missing; those that were written."""
    with opened(path) as stage:
        if stage.is_counted():
            return []
        missing = stage.missing_parts()
        for number, index in enumerate(missing):
            if number == stop_after:
                raise KeyboardInterrupt
            stage.part_path(index).write_text(f"{text} {index}")
        stage.finish(lambda part: {"parts": 1})
    return missing


def swap(path, one, two):
    one, two = (path / "stage" / f"part-0000{index}.txt" for index in (one, two))
    texts = one.read_text(), two.read_text()
    one.write_text(texts[1])
    two.write_text(texts[0])


def contents(path):
    return [part.read_text() for part in checked_parts(path / "stage", "states", "recontrol states")]


def test_all_parts_that_are_not_what_was_written_are_named_at_once(tmp_path):
    write(tmp_path)
    swap(tmp_path, 0, 2)
    (tmp_path / "stage" / "part-00003.txt").unlink()
    with pytest.raises(ValueError, match=r"part-00000\.txt, part-00002\.txt were .*lacks part-00003\.txt.*them"):
        contents(tmp_path)


def test_a_part_that_is_made_anew_lets_no_other_changed_one_in(tmp_path):
    write(tmp_path)
    expected = contents(tmp_path)
    swap(tmp_path, 0, 1)
    (tmp_path / "stage" / "part-00000.txt").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"part-00001\.txt was changed or damaged"):
            write(tmp_path)
    (tmp_path / "stage" / "part-00001.txt").unlink()
    assert write(tmp_path) == [0, 1] and contents(tmp_path) == expected


def test_parts_made_anew_may_have_other_bytes_and_a_stop_between_them_is_gone_on_from(tmp_path):
    """As answers do, which hold how long they took."""
    write(tmp_path)
    for index in (0, 1, 3):
        (tmp_path / "stage" / f"part-0000{index}.txt").unlink()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "new", stop_after=2)
    with pytest.raises(ValueError, match="not finished"):
        contents(tmp_path)
    assert write(tmp_path, "newer") == [3]
    assert contents(tmp_path) == ["new 0", "new 1", "part 2", "newer 3"]
    assert read_manifest(tmp_path / "stage", "states", "")["counts"] == {"parts": FOUR}


def test_a_stop_before_new_parts_are_counted_is_gone_on_from(tmp_path):
    write(tmp_path)
    (tmp_path / "stage" / "part-00001.txt").unlink()
    with pytest.raises(KeyboardInterrupt), opened(tmp_path) as stage:
        stage.part_path(1).write_text("new 1")
        raise KeyboardInterrupt
    assert write(tmp_path) == [] and contents(tmp_path)[1] == "new 1"


@pytest.mark.parametrize("where", ["_open", "_resume"])
def test_a_stop_while_the_folder_is_opened_leaves_no_lock(tmp_path, monkeypatch, where):
    def stopped(self):
        raise KeyboardInterrupt

    stage = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(StageFolder, where, stopped)
        with pytest.raises(KeyboardInterrupt):
            stage.__enter__()
    (tmp_path / "stage" / "manifest.json").unlink(missing_ok=True)
    assert write(tmp_path) == [0, 1, 2, 3]
    with opened(tmp_path), pytest.raises(OSError, match="Another run is working"):
        opened(tmp_path).__enter__()


@dataclass
class Share:
    """One of several processes that share parts, as it runs in a thread."""

    index: int
    count: int
    met: threading.Barrier
    said: list

    def gather(self, value):
        self.said[self.index] = value
        self.met.wait(timeout=20)
        return list(self.said)


def test_processes_share_the_reading_and_learn_all_that_was_found(tmp_path, monkeypatch):
    write(tmp_path)
    read, told, errors = [], [], []
    whole = stage_folder.file_checksum
    monkeypatch.setattr(stage_folder, "file_checksum", lambda path: read.append(path.name) or whole(path))
    parts = read_manifest(tmp_path / "stage", "states", "")["parts"]
    swap(tmp_path, 1, 2)
    shares = [Share(index, 3, threading.Barrier(3), [None] * 3) for index in range(3)]
    for share in shares[1:]:
        share.met, share.said = shares[0].met, shares[0].said

    def hold(share):
        with pytest.raises(ValueError) as error:
            hold_parts(tmp_path / "stage", parts, "it", share, lambda *at: told.append((share.index, *at)))
        errors.append(str(error.value))

    threads = [threading.Thread(target=hold, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read) == sorted(parts)
    assert sorted(told) == [(0, 1, 2), (0, 2, 2), (1, 1, 1), (2, 1, 1)]
    assert len(errors) == 3 and len(set(errors)) == 1 and "part-00001.txt, part-00002.txt were" in errors[0]
