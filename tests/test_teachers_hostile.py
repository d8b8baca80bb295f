"""A store that was damaged, edited, shared or mistaken: one line, never a wrong value."""

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from w2s_jax.data import shards, teachers
from w2s_jax.data.shards import Shards
from w2s_jax.errors import UserError
from w2s_jax.types import Table

V, T, N, K = 50, 6, 7, 3
ABOUT = teachers.About("teacher", V, K)
ROOT = Path(__file__).resolve().parents[1]


def table(rows: int = N, seed: int = 0) -> Table:
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, T)) < 0.6).astype(np.float32)
    return Table({"tokens": rng.integers(0, V, (rows, T)).astype(np.int32), "mask": mask})


def said(of: Table, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (len(of), T, K)
    arrays = {"ids": rng.integers(0, V, shape).astype(np.int32)}
    arrays["logits"] = -rng.integers(1, 8, shape).astype(np.float32)
    return {**arrays, "tail": rng.random(shape[:2]).astype(np.float32)}


def maker(of: Table, arrays=None, step: int = 2):
    arrays = said(of) if arrays is None else arrays

    def make(spans):
        for begin, end in spans:
            for at in range(begin, end, step):
                rows = np.arange(at, min(at + step, end))
                kept = teachers.predicted({"mask": of["mask"][rows]})
                yield at, kept, {name: leaf[rows] for name, leaf in arrays.items()}

    return make


def quiet(line: str) -> None:
    pass


def store(folder, of=None, arrays=None, *, about=ABOUT, shard=2, **how):
    of = table() if of is None else of
    return teachers.write(
        folder, of, about, maker(of, arrays), shard=shard, **{"say": quiet, **how}
    )


def whole(folder, of=None, **how):
    of = table() if of is None else of
    return teachers.read(folder, of, **how).batch(np.arange(len(of)))["teacher"]


def same(one, other) -> None:
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_rows_counted_from_the_end_are_those_rows(tmp_path, size) -> None:
    of = table()
    store(tmp_path, of, shard=size)
    column = teachers.read(tmp_path, of)["teacher"]["ids"]
    every = column[np.arange(N)]
    back = np.arange(-N, N)[::-1]
    np.testing.assert_array_equal(column[back], every[back])
    for beyond in (N, -N - 1):
        with pytest.raises(IndexError):
            column[np.array([beyond])]


def test_an_index_of_another_width_is_not_taken_for_the_last_one(tmp_path) -> None:
    of = table()
    store(tmp_path, of)
    column = teachers.read(tmp_path, of)["teacher"]["ids"]
    assert len(column[np.array([1], np.int64)]) == 1
    narrow = np.array([1, 0], np.int32)  # the same eight bytes
    np.testing.assert_array_equal(column[narrow], column[np.arange(N)][narrow])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_forbidden_token_stays_finite_and_impossible(tmp_path, dtype) -> None:
    of = table()
    arrays = said(of)
    arrays["logits"][..., -1] = -1e9
    store(tmp_path, of, arrays, about=teachers.About("t", V, K, dtype=dtype))
    logits = whole(tmp_path)["logits"].astype(np.float32)
    assert np.isfinite(logits).all()
    where = teachers.predicted({"mask": of["mask"]})
    assert (np.exp(logits[where][:, -1]) == 0).all() and (logits[where][:, 0] > -9).all()


@pytest.mark.parametrize(
    ("leaf", "value", "words"),
    [
        ("ids", V, "names token 50"),
        ("ids", -1, "names token -1"),
        ("logits", np.nan, "not finite"),
        ("logits", 0.5, "above 0"),
        ("tail", np.nan, "not finite"),
        ("tail", 1.5, "remaining mass"),
    ],
)
def test_what_no_teacher_can_say_is_refused_and_not_kept(tmp_path, leaf, value, words) -> None:
    of = table()
    arrays = said(of)
    row, place = np.argwhere(teachers.predicted({"mask": of["mask"]}))[-1]
    arrays[leaf][row, place] = value
    with pytest.raises(UserError, match=words):
        store(tmp_path, of, arrays)
    with pytest.raises(UserError, match="half-written"):
        whole(tmp_path, of)
    store(tmp_path, of)
    store(tmp_path / "again", of)
    same(whole(tmp_path, of, verify=True), whole(tmp_path / "again", of))


def test_no_rows_and_nothing_to_predict(tmp_path) -> None:
    with pytest.raises(UserError, match="no rows"):
        store(tmp_path, table(0))
    idle = table().with_columns(mask=np.zeros((N, T), np.float32))
    with pytest.raises(UserError, match="predicts nothing"):
        store(tmp_path, idle)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", ["npy", "array_record"])
def test_rows_and_shards_without_predictions_are_kept(tmp_path, storage) -> None:
    some = table()
    mask = some["mask"].copy()
    mask[2:4] = 0  # the whole second shard
    some = some.with_columns(mask=mask)
    store(tmp_path, some, storage=storage)
    got, want = whole(tmp_path, some, verify=True), said(some)
    where = teachers.predicted({"mask": mask})
    np.testing.assert_array_equal(got["ids"][where], want["ids"][where])
    assert (got["ids"][2:4] == np.arange(K)).all()


def test_a_flipped_byte_is_told_and_mended(tmp_path) -> None:
    store(tmp_path)
    before = whole(tmp_path)
    path = sorted(tmp_path.glob("*/*.npy"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001.npy is damaged: its content .*and write it again"):
        whole(tmp_path, verify=True)
    lines = []
    store(tmp_path, verify=True, say=lines.append)
    assert "making it again" in lines[0] and "(1 new)" in lines[1]
    same(whole(tmp_path, verify=True), before)


def test_no_flipped_byte_of_a_header_escapes(tmp_path) -> None:
    """Without hashes: every byte of the header of a shard, read or refused in one line."""
    of = table()
    store(tmp_path, of)
    before = whole(tmp_path, of)
    path = sorted(tmp_path.glob("*/*.npy"))[0]
    content = path.read_bytes()
    told = 0
    for place in range(content.index(b"\n") + 1):
        for bit in (1 << place % 8,):
            flipped = bytearray(content)
            flipped[place] ^= bit
            path.write_bytes(flipped)
            try:
                same(whole(tmp_path, of), before)
            except UserError as error:
                told += 1
                assert "damaged" in str(error) and "\n" not in str(error)
    assert told > 50


def test_the_store_of_another_table_under_this_ones_name_is_refused(tmp_path) -> None:
    mine, other = table(), table(seed=5)
    store(tmp_path, other)
    (tmp_path / teachers.identity(other)).rename(tmp_path / teachers.identity(mine))
    with pytest.raises(UserError, match="another table"):
        whole(tmp_path, mine)
    with pytest.raises(UserError, match="holds table"):
        store(tmp_path, mine)


def test_exchanged_shards_are_seen_when_asked(tmp_path) -> None:
    full = table().with_columns(mask=np.ones((N, T), np.float32))
    store(tmp_path, full)
    first, second = sorted(tmp_path.glob("*/*.npy"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(UserError, match="its content is not what was written"):
        whole(tmp_path, full, verify=True)


def test_a_second_writer_is_refused_while_the_first_writes(tmp_path) -> None:
    of, tried = table(), []
    make = maker(of)

    def meanwhile(spans):
        for piece in make(spans):
            if not tried:
                with pytest.raises(UserError, match="another process writes"):
                    store(tmp_path, of)
                tried.append(piece)
            yield piece

    teachers.write(tmp_path, of, ABOUT, meanwhile, shard=2, say=quiet)
    assert tried
    store(tmp_path / "alone", of)
    same(whole(tmp_path, of, verify=True), whole(tmp_path / "alone", of))
    store(tmp_path, of)  # a finished one is nobody's


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch) -> None:
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    store(tmp_path)
    assert len(whole(tmp_path, verify=True)["ids"]) == N


def test_a_finished_store_is_read_and_reused_where_nothing_can_be_written(
    tmp_path, monkeypatch
) -> None:
    store(tmp_path)
    before = whole(tmp_path)

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "touch", "write_text", "write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    for name in ("replace", "rename", "mkdir", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    opened = os.open

    def looking(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse()
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", looking)
    store(tmp_path)
    same(whole(tmp_path), before)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*Not a directory"):
        store(tmp_path / "file")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="cannot write .*Permission denied"):
        store(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["npy", "array_record"])
def test_a_disk_that_fills_up_within_a_shard_is_one_line(tmp_path, storage) -> None:
    """A limit on the size of files stands for the full disk; what was written before stays."""
    pytest.importorskip("array_record" if storage == "array_record" else "numpy")
    code = (
        "import resource, signal, sys\n"
        f"sys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]!r}\n"
        "import test_teachers_hostile as world\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "of = world.table(4000)\n"
        "limit = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))\n"
        "try:\n"
        f"    world.store({str(tmp_path)!r}, of, storage={storage!r}, shard=100) and 0\n"
        "    limit(40000)\n"
        f"    world.store({str(tmp_path / 'more')!r}, of, storage={storage!r}, shard=3900)\n"
        "except world.UserError as error:\n"
        "    print('told:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("told: cannot write") and done.stdout.count("\n") == 1
    left = [path.name for path in (tmp_path / "more").rglob("*") if path.is_file()]
    assert [name for name in left if not name.endswith(".lock")] == []


def death(folder: str) -> None:
    """In child processes: die at the n-th thing done to the file system, then go on, for all n."""
    of = table()
    finished = 0
    for number in range(200):
        place = Path(folder) / str(number)
        child = os.fork()
        if not child:
            mortal(number)
            store(place, of)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        child = os.fork()
        if not child:
            store(place, of)
            store(place.with_name("whole"), of)
            same(whole(place, of, verify=True), whole(place.with_name("whole"), of))
            litter = [p.name for p in place.rglob("*") if p.name.startswith(".") and p.is_file()]
            print(number, died, litter, flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, number
        finished += died == 0
        if finished:
            break
    print("ends", number, flush=True)


def mortal(number: int) -> None:
    """This process ends at once, without a word, when ``number`` calls have been made."""
    left = [number]

    def dying(real):
        def call(*given, **named):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return real(*given, **named)

        return call

    for place, name in [
        *((os, name) for name in ("replace", "fsync", "chmod", "write")),
        *((Path, name) for name in ("mkdir", "unlink", "stat")),
        (np.lib.format, "write_array"),
        (shards, "_hash"),
        (shards.workdir, "write"),
    ]:
        setattr(place, name, dying(getattr(place, name)))


@pytest.mark.slow
def test_death_at_any_moment_costs_one_shard_and_leaves_nothing_behind(tmp_path) -> None:
    code = (
        f"import sys, warnings\nsys.path[:0] = {[str(ROOT / 'tests'), str(ROOT)]!r}\n"
        "warnings.simplefilter('ignore')\n"
        f"import test_teachers_hostile as world\nworld.death({str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    lines = done.stdout.splitlines()
    assert int(lines[-1].split()[1]) > 20, "the calls were not seen"
    assert [line for line in lines[:-1] if not line.endswith("[]")] == []


def test_the_limit_of_open_files_is_not_reached(tmp_path, monkeypatch) -> None:
    """A large store has more shards than a process may have files; each map holds one open."""
    monkeypatch.setattr(teachers, "OPEN", 20)
    many = table(120)
    store(tmp_path, many, shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 100), hard))
    try:
        assert len(whole(tmp_path, many)["ids"]) == 120
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_reader_beside_the_writer_sees_whole_shards_only(tmp_path, monkeypatch) -> None:
    of, seen = table(), []
    put = Shards.put

    def looking(self, number, *rest, **notes):
        put(self, number, *rest, **notes)
        if number < 3:
            with pytest.raises(UserError, match="half-written"):
                whole(tmp_path, of)
            seen.append(number)

    monkeypatch.setattr(Shards, "put", looking)
    store(tmp_path, of)
    assert seen == [0, 1, 2] and len(whole(tmp_path, of)["ids"]) == N
