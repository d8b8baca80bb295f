"""Prompts, states and comparisons that tests of sampling inside the step share."""

import jax
import jax.numpy as jnp
import numpy as np

from w2s_jax.types import State


def asked(prompts, width=5):
    ids, segment = (np.zeros((len(prompts), width), np.int32) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], segment[row, width - len(prompt) :] = prompt, 1
    return {"tokens": ids, "segment": segment}


def state(frozen, step=0) -> State:
    return State(jnp.int32(step), jnp.int32(10), (), (), frozen, ())


def close(got, want, rtol=1e-3, atol=1e-3):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)
