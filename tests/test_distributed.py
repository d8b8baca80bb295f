"""Two processes of ``jax.distributed`` train as one device does, and leave one checkpoint.

As a script, ``python tests/test_distributed.py FOLDER MESH [STEP]`` is one of the processes; the
second one gets SIGTERM after update STEP.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


def run(folder, mesh, **changes):
    """A short run of the model of ``test_resume``, with rows and checkpoints in ``folder``."""
    from test_resume import TUNE, table, train

    from w2s_jax.types import Table

    data = table()
    columns = {name: np.tile(data[name], (2, 1)) for name in ("features", "label")}
    return train(folder, data=Table(columns), mesh=mesh, tune=TUNE, **changes)


def main(folder, spec, terminate=-1):
    from w2s_jax import mesh as meshes

    assert meshes.distribute()
    import jax

    assert jax.process_count() == 2 and len(jax.devices()) == 4
    mesh = meshes.make_mesh(spec)

    def hook(step):
        if step == terminate and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1 if terminate >= 0 else 0)  # the news has to travel

    state = run(folder, mesh, hook=hook)
    assert not state.params["first"].is_fully_addressable
    rows = meshes.batch_rows(mesh, 8)
    np.save(folder / f"rows-{jax.process_index()}.npy", rows)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return np.asarray([row["loss"] for row in rows if "loss" in row])


def two_processes(folder, *words):
    """Run this file twice; exit codes and stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *words],
            env=common | {"JAX_PROCESS_ID": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
        return [process.returncode for process in processes], errors
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("spec, rows", [("data=2,fsdp=2", 4), ("tensor=4", 8)])
def test_two_processes_give_the_single_device_curve(tmp_path, spec, rows):
    run(tmp_path / "one", None)
    folder = tmp_path / "two"
    folder.mkdir()
    codes, errors = two_processes(folder, spec)
    assert codes == [0, 0], errors
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "one"), rtol=1e-5)
    assert [len(np.load(folder / f"rows-{i}.npy")) for i in range(2)] == [rows, rows]
    # the checkpoint of two processes opens in one, at its end
    assert int(run(folder, None).step) == 30


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_after_the_same_update(tmp_path):
    run(tmp_path / "one", None)
    folder = tmp_path / "two"
    folder.mkdir()
    codes, errors = two_processes(folder, "data=4", "6")
    assert all(codes), errors
    stopped = [re.search(r"Interrupted: stopped by SIGTERM after update (\d+)", e) for e in errors]
    assert stopped[0] and stopped[1] and stopped[0][1] == stopped[1][1], errors
    assert int(stopped[0][1]) in {int(p.name) for p in (folder / "checkpoints").iterdir()}
    assert two_processes(folder, "data=4")[0] == [0, 0]
    np.testing.assert_allclose(losses(folder), losses(tmp_path / "one"), rtol=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
