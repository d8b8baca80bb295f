"""Workdirs that cannot be used, full disks, damaged records: one line, nothing lost."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from bad_world import Case, Spoil, World, flags, refused, stopped


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    return World(tmp_path)


def _file_instead(world: World) -> None:
    world.flags["--workdir"] = str(world.data / "own.jsonl")


def _changed_config(world: World) -> None:
    world.flags["--seeds"] = "3"


def damage(name: str, text: str) -> Spoil:
    """Put ``text`` in the place of a record of the finished run."""
    return lambda world: (world.workdir / name).write_text(text)


WORKDIRS: dict[str, Case] = {
    "a file in its place": (_file_instead, ("cannot write to --workdir", "own.jsonl")),
    "no such file system": (flags(workdir="/proc/none/run"), ("cannot write", "/proc/none")),
    "a changed config": (_changed_config, ("seeds 2 -> 3", "--fresh", "--workdir")),
    "a damaged config": (damage("config.json", '{"paper"'), ("config.json", "--fresh")),
    "damaged rows": (damage("results.jsonl", '{"seed": 0}\n{"se'), ("line 2", "--fresh")),
}


@pytest.mark.parametrize("name", WORKDIRS)
def test_workdir_of_a_finished_run(name, world, monkeypatch, capsys) -> None:
    world.go(monkeypatch)
    assert (world.workdir / "summary.json").is_file()
    spoil, words = WORKDIRS[name]
    spoil(world)
    capsys.readouterr()
    refused(world, monkeypatch, capsys, words)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_for_the_rows(world, monkeypatch, capsys) -> None:
    (world.workdir / "results.part.jsonl").symlink_to("/dev/full")
    assert "the disk is full" in stopped(world, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")]
)
def test_a_stage_that_cannot_be_kept(world, monkeypatch, capsys, number, words) -> None:
    def refuse(file, **_):
        raise OSError(number, os.strerror(number), str(getattr(file, "name", file)))

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", refuse)
        assert words in stopped(world, patch, capsys)
    assert not list(world.workdir.rglob(".artefact*"))
    world.go(monkeypatch)  # once there is room the same command ends well
    assert (world.workdir / "summary.json").is_file()


def test_a_folder_without_permission(world, monkeypatch, capsys) -> None:
    world.workdir.chmod(0o500)
    try:
        if os.access(world.workdir, os.W_OK):
            pytest.skip("this user may write anywhere")
        assert "cannot write to --workdir" in stopped(world, monkeypatch, capsys)
    finally:
        world.workdir.chmod(0o700)


def test_a_damaged_stage_is_made_again(world, monkeypatch, capsys) -> None:
    world.go(monkeypatch)
    rows_before = (world.workdir / "results.jsonl").read_bytes()
    (world.workdir / "results.jsonl").unlink()
    stages = list(world.workdir.glob("*/artefact.npz"))
    stages[0].write_bytes(stages[0].read_bytes()[:-50])
    capsys.readouterr()
    world.go(monkeypatch)
    assert capsys.readouterr().out.count("is damaged") == 1
    assert (world.workdir / "results.jsonl").read_bytes() == rows_before
