"""A killed run, resumed, is the run that was never killed: bit for bit, row for row.

As a script, ``python tests/test_resume.py FOLDER`` trains in FOLDER and leaves ``final.npz``.
"""

import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.mesh import make_mesh
from w2s_jax.train.checkpoint import damage, read_params
from w2s_jax.train.fit import Interrupted, NotFinite, fit
from w2s_jax.train.optim import Tune
from w2s_jax.types import Aux, Table

STEPS, SAVE = 30, 7
TUNE = Tune(lr=0.01, batch=8, steps=STEPS, micro=2, schedule="cosine", warmup=0.1)
AXES = {"first": ("embed", "ffn"), "second": ("ffn", None)}


def params():
    rng = np.random.default_rng(0)
    return {
        "first": jnp.asarray(rng.normal(size=(8, 64)), jnp.float32),
        "second": jnp.asarray(rng.normal(size=(64, 2)), jnp.float32),
    }


def table():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 8)).astype(np.float32)
    return Table({"features": x, "label": np.eye(2, dtype=np.float32)[(x[:, 0] > 0).astype(int)]})


def objective(params, state, batch, key):
    """Dropout draws from the key, and the memory enters the loss: both must survive."""
    hidden = jnp.tanh(batch["features"] @ params["first"])
    hidden = hidden * jax.random.bernoulli(key, 0.8, hidden.shape)
    losses = -(jax.nn.log_softmax(hidden @ params["second"]) * batch["label"]).sum(-1)
    mean = 0.9 * state.memory + 0.1 * jax.lax.stop_gradient(losses.mean())
    return (losses * (1 + mean)).sum(), jnp.float32(len(losses)), Aux(memory=mean)


def train(folder, *, key=0, tune=TUNE, data=None, hook=lambda step: None, **changes):
    """The run of this file; ``hook(step)`` is called at every third update."""

    def evaluate(state):
        hook(int(state.step))
        return {"size": float(jnp.abs(state.params["first"]).sum()), "memory": float(state.memory)}

    run = {"save_every": SAVE, "evaluate": evaluate, "eval_every": 3, "progress": False}
    run |= {"memory": jnp.float32(0.0), "axes": AXES, "workdir": folder} | changes
    rows = table() if data is None else data
    return fit(objective, params(), rows, tune, jax.random.key(key), **run)


def main(folder):
    state = train(folder, hook=lambda step: time.sleep(0.03))
    np.savez(folder / "final.npz", memory=state.memory, **state.params)


def result(folder):
    """Final weights as bytes, and the rows."""
    with np.load(folder / "final.npz") as file:
        return {k: file[k].tobytes() for k in file}, (folder / "metrics.jsonl").read_text()


def spawn(folder):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def interrupt(folder, number, row):
    """Run until ``row`` rows are on disk, then send the signal; the exit code and stderr."""
    process = spawn(folder)
    path, limit = folder / "metrics.jsonl", time.time() + 120
    while process.poll() is None and time.time() < limit:
        if path.exists() and path.read_text().count("\n") >= row:
            process.send_signal(number)
            break
        time.sleep(0.001)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = spawn(folder)
    assert process.communicate(timeout=120) and process.returncode == 0
    return result(folder)


def check(folder, number, row, uninterrupted):
    code, err = interrupt(folder, number, row)
    if number == signal.SIGTERM:
        assert code == 1 and "Interrupted: stopped by SIGTERM after update" in err
    else:
        assert code == -signal.SIGKILL
    process = spawn(folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert result(folder) == uninterrupted


@pytest.mark.parametrize("number, row", [(signal.SIGKILL, 17), (signal.SIGTERM, 29)])
def test_resumes_bit_for_bit(tmp_path, number, row, uninterrupted):
    check(tmp_path, number, row, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("seed", range(5))
def test_resumes_bit_for_bit_at_random_steps(tmp_path, number, seed, uninterrupted):
    row = random.Random(f"{number} {seed}").randint(1, STEPS + STEPS // 3 - 2)
    check(tmp_path, number, row, uninterrupted)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, uninterrupted):
    for row in (9, 16, 24, 37):
        assert interrupt(tmp_path, signal.SIGKILL, row)[0] == -signal.SIGKILL
    spawn(tmp_path).communicate(timeout=120)
    assert result(tmp_path) == uninterrupted


class Stop(Exception):
    """Ends a run from within, as a crash would."""


def crash_at(step):
    def hook(now):
        if now == step:
            raise Stop

    return hook


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def equals(state, folder, uninterrupted):
    weights, rows = uninterrupted
    assert {name: np.asarray(w).tobytes() for name, w in state.params.items()}.items() <= (
        weights.items()
    )
    assert (folder / "metrics.jsonl").read_text() == rows


def test_a_second_run_only_reads_the_result(tmp_path, uninterrupted):
    equals(train(tmp_path), tmp_path, uninterrupted)
    equals(train(tmp_path), tmp_path, uninterrupted)
    assert steps_in(tmp_path) == [28, 30]


def test_restores_on_other_meshes(tmp_path, uninterrupted):
    """8 devices to 15, 1 device to 24, 4 devices to the end: the curve of one device."""
    for step, mesh in ((15, make_mesh("data=2,fsdp=2,tensor=2")), (24, None)):
        with pytest.raises(Stop):
            train(tmp_path, mesh=mesh, hook=crash_at(step))
    state = train(tmp_path, mesh=make_mesh("fsdp=2,tensor=2", jax.devices()[:4]))
    assert state.params["first"].addressable_shards[0].data.shape == (4, 32)
    rows, whole = (
        [json.loads(line) for line in text.splitlines()]
        for text in ((tmp_path / "metrics.jsonl").read_text(), uninterrupted[1])
    )
    for got, want in zip(rows, whole, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_checkpoint_holds_what_was_saved_although_the_state_is_donated(tmp_path):
    """The background write must not see the updates that reuse the memory."""
    big = params() | {"first": jnp.ones((8, 1 << 18))} | {"second": jnp.zeros((1 << 18, 2))}
    kept = {}

    def evaluate(state):
        kept[int(state.step)] = np.array(state.params["first"])
        return {}

    tune = Tune(lr=0.1, batch=8, steps=6)
    fit(
        objective, big, table(), tune, jax.random.key(0), workdir=tmp_path, save_every=3,
        memory=jnp.float32(0.0), evaluate=evaluate, eval_every=1, progress=False,
    )  # fmt: skip
    read = read_params(tmp_path / "checkpoints", big, step=3)
    np.testing.assert_array_equal(read["first"], kept[3])
    assert not np.array_equal(kept[3], kept[4])


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    """A run that died after update 18, with checkpoints 7 and 14."""
    folder = tmp_path_factory.mktemp("crashed")
    with pytest.raises(Stop):
        train(folder, hook=crash_at(18))
    return folder


@pytest.mark.parametrize(
    "change, name",
    [
        ({"tune": dataclasses.replace(TUNE, lr=0.02)}, r"lr \(0.01 -> 0.02\)"),
        ({"key": 7}, "key"),
        ({"data": table().take(range(40))}, "rows .*data"),
        ({"config": {"loss": "dpo"}}, r"loss \(None -> dpo\)"),
    ],
)
def test_changed_settings_are_named(crashed, change, name):
    rows = (crashed / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=name) as error:
        train(crashed, **change)
    assert "\n" not in str(error.value)
    assert (crashed / "metrics.jsonl").read_text() == rows and steps_in(crashed) == [7, 14]


def biggest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("hurt", [flip, cut, Path.unlink])
def test_damaged_checkpoint_falls_back(tmp_path, crashed, capsys, hurt, uninterrupted):
    shutil.copytree(crashed, tmp_path / "run")
    hurt(biggest(tmp_path / "run" / "checkpoints" / "14" / "params"))
    equals(train(tmp_path / "run"), tmp_path / "run", uninterrupted)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("checkpoint 14 in ") and "damaged" in err


@pytest.mark.parametrize("name", ["params/manifest.ocdbt", "meta/metadata"])
def test_damage_without_checksums_is_found(tmp_path, crashed, capsys, name, uninterrupted):
    """Killed between the checkpoint and its checksums, then truncated."""
    shutil.copytree(crashed, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "14"
    (folder / "sums.json").unlink()
    (folder / name).write_bytes(b"")
    assert damage(folder) == ""
    equals(train(tmp_path / "run"), tmp_path / "run", uninterrupted)
    assert capsys.readouterr().err.startswith("checkpoint 14 in ")


def test_when_every_checkpoint_is_damaged(tmp_path, crashed, uninterrupted):
    shutil.copytree(crashed, tmp_path / "run")
    for step in ("7", "14"):
        cut(biggest(tmp_path / "run" / "checkpoints" / step / "opt"))
    with pytest.raises(UserError, match="no checkpoint .* can be read"):
        train(tmp_path / "run")
    equals(train(tmp_path / "run"), tmp_path / "run", uninterrupted)  # afresh


def test_nan_keeps_the_checkpoints(tmp_path):
    def breaking(params, state, batch, key):
        total, weight, aux = objective(params, state, batch, key)
        return jnp.where(state.step == 17, jnp.nan, 1.0) * total, weight, aux

    with pytest.raises(NotFinite, match="at update 17.*checkpoint 14 is intact"):
        fit(
            breaking, params(), table(), TUNE, jax.random.key(0), workdir=tmp_path,
            save_every=SAVE, memory=jnp.float32(0.0), progress=False,
        )  # fmt: skip
    assert steps_in(tmp_path) == [7, 14]


def test_a_signal_within_the_process_saves_and_restores_the_handler(tmp_path):
    def hook(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="SIGINT after update 7 of 30; saved in .* again"):
        train(tmp_path, hook=hook)
    assert steps_in(tmp_path) == [7]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(Interrupted, match="no workdir"):
        train(None, hook=hook)


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    def fill(step):
        if step == 9:
            monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3000))

    with pytest.raises(UserError, match="cannot write checkpoints .* MB are needed"):
        train(tmp_path, hook=fill)
    assert steps_in(tmp_path) == [7] and damage(tmp_path / "checkpoints" / "7") == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_disk_that_fills_up_while_writing(tmp_path, uninterrupted):
    """A file-size limit stands in for the full disk: the background write fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):
        if step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))

    try:
        with pytest.raises(UserError, match="cannot write checkpoints") as error:
            train(tmp_path, hook=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert damage(tmp_path / "checkpoints" / "7") == ""
    equals(train(tmp_path), tmp_path, uninterrupted)


def test_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        train(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_read_params_of_a_missing_step(tmp_path):
    train(tmp_path, tune=Tune(batch=8, steps=2))
    assert read_params(tmp_path / "checkpoints", params(), 2).keys() == params().keys()
    with pytest.raises(UserError, match="no checkpoint 3"):
        read_params(tmp_path / "checkpoints", params(), 3)
    with pytest.raises(UserError, match="no checkpoint"):
        read_params(tmp_path / "nowhere", params())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
