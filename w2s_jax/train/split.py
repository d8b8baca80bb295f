"""One run of a population as ``fit`` would have left it: checkpoint and metrics in a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

import jax

from w2s_jax.errors import UserError
from w2s_jax.train.checkpoint import Store
from w2s_jax.train.fit import identity
from w2s_jax.train.log import Log
from w2s_jax.train.optim import Tune
from w2s_jax.train.population import Population
from w2s_jax.types import Table


def write_run(
    runs: Population, i: int, workdir: str | Path, table: Table, tune: Tune, seed: int
) -> None:
    """Write run ``i`` into ``workdir``: its last checkpoint and its ``metrics.jsonl``.

    ``fit`` called there with the run's own table, ``tune`` (its learning rate in it) and
    ``jax.random.key(seed)`` finds the run finished and returns its state. To write weights for
    others, hand ``runs.run(i)[0]`` to ``models.hf.export`` or ``models.peft.export_adapter``.

    Raises:
      UserError: a population without states (``keep_state``), a run that broke, a folder with
        another run's checkpoints or that cannot be written.
    """
    if runs.states is None:
        raise UserError("write_run needs whole states; call population with keep_state=True")
    if i in runs.failed:
        raise UserError(f"run {i} broke (its loss was not finite): there is nothing to keep of it")
    state = jax.tree.map(lambda leaf: leaf[i], runs.states)
    key = tuple(int(word) for word in jax.random.key_data(jax.random.key(seed)))
    meta = identity(tune, int(state.steps), [table], key, state.params)
    with contextlib.closing(Store(Path(workdir) / "checkpoints", 2, meta)) as store:
        if store.latest() is not None:
            raise UserError(f"{workdir} has checkpoints already: give each run a folder of its own")
        with contextlib.closing(Log(workdir)) as log:
            for step in range(int(state.steps)):
                log.write(step + 1, {name: line[i][step] for name, line in runs.metrics.items()})
        store.save(state)
