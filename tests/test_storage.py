"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import os
import stat
import threading

import pytest
from small_inputs import listing

from easi3r.errors import OutputError
from easi3r.storage import MARKER, check_output, whole_file, whole_folder


def write(path, text="new", *, overwrite=False):
    with whole_folder(path, overwrite=overwrite) as folder:
        (folder / MARKER).write_text(text)
    return path


class OwnError(Exception):
    pass


def write_half(path, error=OwnError, *, overwrite=False):
    with pytest.raises(error), whole_folder(path, overwrite=overwrite) as folder:
        (folder / "depth").mkdir()
        (folder / "depth" / "frame_00000.npy").write_bytes(b"half")
        raise error("in the middle of it")


def test_on_success_there_is_the_folder_and_nothing_else(tmp_path):
    write(tmp_path / "out")
    assert listing(tmp_path) == ["out", f"out/{MARKER}"]


def test_while_it_is_written_the_folder_is_not_there(tmp_path):
    with whole_folder(tmp_path / "out", overwrite=False) as folder:
        assert folder.is_dir() and folder.parent == tmp_path
        assert folder.name.startswith(".") and not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [OwnError, KeyboardInterrupt, SystemExit, MemoryError])
def test_after_an_exception_nothing_is_left_and_it_passes_unchanged(tmp_path, error):
    (tmp_path / "neighbour").touch()
    write_half(tmp_path / "out", error)
    assert listing(tmp_path) == ["neighbour"]


def test_after_an_exception_parents_that_were_made_are_removed_and_others_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    write_half(tmp_path / "mine" / "a" / "b" / "out")
    assert listing(tmp_path) == ["mine"]


def test_a_parent_that_somebody_else_used_meanwhile_stays(tmp_path):
    with pytest.raises(OwnError), whole_folder(tmp_path / "a" / "b" / "out", overwrite=False):
        (tmp_path / "a" / "theirs").touch()
        raise OwnError
    assert listing(tmp_path) == ["a", "a/theirs"]


def test_nested_parents_are_made(tmp_path):
    write(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / MARKER).read_text() == "new"


def test_a_relative_path_is_relative_to_where_we_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with whole_folder("out", overwrite=False):
        os.chdir("elsewhere")
    assert (tmp_path / "out").is_dir()


def test_a_refusal_of_the_file_system_becomes_one_sentence(tmp_path):
    message = r"out cannot be written: No space left on device; choose"
    with pytest.raises(OutputError, match=message), whole_folder(tmp_path / "out", overwrite=False):
        raise OSError(28, "No space left on device")
    assert listing(tmp_path) == []


# --- what is there already


def test_what_exists_is_refused_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("folder", "file", "dangling"):
        with pytest.raises(OutputError, match=rf"{name} exists; .*--overwrite"):
            check_output(tmp_path / name, overwrite=False)
        with pytest.raises(OutputError, match=rf"{name} exists and holds no {MARKER}"):
            check_output(tmp_path / name, overwrite=True)


def test_overwrite_replaces_an_earlier_result_as_a_whole(tmp_path):
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "report.html").touch()
    write(tmp_path / "out", "new", overwrite=True)
    assert listing(tmp_path) == ["out", f"out/{MARKER}"]
    assert (tmp_path / "out" / MARKER).read_text() == "new"


def test_overwrite_where_there_is_nothing_just_writes(tmp_path):
    assert (write(tmp_path / "out", overwrite=True) / MARKER).is_file()


def test_the_old_result_stays_until_the_new_one_is_whole(tmp_path):
    write(tmp_path / "out", "old")
    with whole_folder(tmp_path / "out", overwrite=True):
        assert (tmp_path / "out" / MARKER).read_text() == "old"
    write(tmp_path / "two", "old")
    write_half(tmp_path / "two", overwrite=True)
    assert (tmp_path / "two" / MARKER).read_text() == "old"
    assert [name for name in listing(tmp_path) if name.startswith(".")] == []


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter_1.tex").write_text("two years of work")
    with pytest.raises(OutputError, match="remove it first"):
        write(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter_1.tex").read_text() == "two years of work"
    assert listing(tmp_path) == ["thesis", "thesis/chapter_1.tex"]


def test_the_old_result_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    write(tmp_path / "out", "old")
    rename = type(tmp_path).rename

    def refuse(self, target):
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / MARKER).read_text() == "old"
    assert listing(tmp_path) == ["out", f"out/{MARKER}"]


def test_of_a_symbolic_link_the_link_alone_is_replaced(tmp_path):
    write(tmp_path / "run_7", "old")
    (tmp_path / "latest").symlink_to("run_7")
    with pytest.raises(OutputError, match="exists"):
        write(tmp_path / "latest")
    write(tmp_path / "latest", "new", overwrite=True)
    assert not (tmp_path / "latest").is_symlink() and (tmp_path / "latest" / MARKER).read_text() == "new"
    assert (tmp_path / "run_7" / MARKER).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "run_7"]


def test_a_parent_may_be_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    write(tmp_path / "link" / "out")
    assert (tmp_path / "disk" / "out" / MARKER).is_file()


# --- where nothing can be written


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "out"):
        with pytest.raises(OutputError, match=r"file is a file; expected a folder"):
            write(path)
    assert listing(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"no permission to write in .*theirs"):
        write(tmp_path / "theirs" / "a" / "out")


def test_a_name_that_the_file_system_cannot_hold(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write(tmp_path / ("x" * 256))
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["two words", "two\nlines", "größer 文件", "x" * 255, "文" * 85, "-o", "a.b.partial", "%s {0} *?["]
)
def test_any_name_that_the_file_system_can_hold(tmp_path, name):
    write(tmp_path / name, "old")
    write(tmp_path / name, "new", overwrite=True)
    assert (tmp_path / name / MARKER).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- others


def test_of_two_writers_the_second_is_refused(tmp_path):
    with pytest.raises(OutputError, match="exists"), whole_folder(tmp_path / "out", overwrite=False):
        write(tmp_path / "out", "first")
    assert (tmp_path / "out" / MARKER).read_text() == "first"
    assert listing(tmp_path) == ["out", f"out/{MARKER}"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced_unless_it_is_ours(tmp_path):
    with pytest.raises(OutputError, match="remove it first"), whole_folder(tmp_path / "out", overwrite=True):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert listing(tmp_path) == ["out", "out/theirs"]


@pytest.mark.parametrize("moment", ["when ours takes the place", "when the old one comes back"])
def test_another_result_that_takes_the_place_first_stays_and_the_old_one_goes(tmp_path, monkeypatch, moment):
    write(tmp_path / "out", "old")
    rename = type(tmp_path).rename

    def be_late(self, target):
        if target == tmp_path / "out":
            if self.suffix == ".partial" and moment == "when the old one comes back":
                raise OSError(5, "Input/output error")
            target.mkdir()
            (target / MARKER).write_text("theirs")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", be_late)
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "out", "ours", overwrite=True)
    assert (tmp_path / "out" / MARKER).read_text() == "theirs"
    assert listing(tmp_path) == ["out", f"out/{MARKER}"]


def test_many_writers_that_overwrite_leave_one_whole_folder(tmp_path):
    start = threading.Barrier(6)
    done, refused = [], []

    def work(number):
        start.wait()
        for _ in range(10):
            try:
                with whole_folder(tmp_path / "out", overwrite=True) as folder:
                    (folder / "number").write_text(str(number))
                    (folder / MARKER).write_text(str(number))
                done.append(number)
            except OutputError as error:  # another one's folder came between
                refused.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert listing(tmp_path) == ["out", "out/number", f"out/{MARKER}"]
    assert (tmp_path / "out" / "number").read_text() == (tmp_path / "out" / MARKER).read_text()
    assert done and len(done) + len(refused) == 60  # nobody ended with another error


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    previous = os.umask(mask)
    try:
        write(tmp_path / "a" / "out")
    finally:
        os.umask(previous)
    for path, mode in ((tmp_path / "a" / "out", 0o777), (tmp_path / "a" / "out" / MARKER, 0o666)):
        assert stat.S_IMODE(path.stat().st_mode) == mode & ~mask


def test_the_group_of_a_shared_folder_is_inherited(tmp_path):
    tmp_path.chmod(0o2775)
    write(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & stat.S_ISGID


# --- single files


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    (tmp_path / "a.png").write_text("old")
    with whole_file(tmp_path / "a.png") as partial:
        assert partial.suffix == ".png"
        partial.write_text("new")
        assert (tmp_path / "a.png").read_text() == "old"
    assert (tmp_path / "a.png").read_text() == "new"
    with pytest.raises(OwnError), whole_file(tmp_path / "a.png") as partial:
        partial.write_text("half")
        raise OwnError
    assert (tmp_path / "a.png").read_text() == "new" and listing(tmp_path) == ["a.png"]


def test_what_the_file_system_refuses_of_a_file_is_one_sentence(tmp_path):
    with (
        pytest.raises(OutputError, match=r"b\.png cannot be written"),
        whole_file(tmp_path / "no" / "b.png") as partial,
    ):
        partial.write_text("text")
