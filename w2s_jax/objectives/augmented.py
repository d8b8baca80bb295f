"""Any objective on augmented pictures."""

from __future__ import annotations

from collections.abc import Callable

import jax

from w2s_jax.errors import UserError
from w2s_jax.types import Array, Batch, Objective, Params, State

_AUGMENT = 0x61756731  # tells the key of the augmentation from what the objective draws


def augmented(objective: Objective, augment: Callable[[Array, Array], Array]) -> Objective:
    """``objective`` on a batch whose ``image`` [B,H,W,C] is ``augment(key, image)``.

    The key is the step's, so every update sees its own change, and a live teacher in
    ``state.frozen`` sees the very pictures that the student sees (Beyer et al. 2022, arXiv
    2106.05237, on why it should). Columns made beforehand, such as ``teacher.classes``, still speak
    of the pictures as they were.

    Raises:
      UserError: a batch without ``image``.
    """

    def changed(params: Params, state: State, batch: Batch, key: Array):
        if "image" not in batch:
            raise UserError(f"augmented needs the column 'image', got {sorted(batch)}")
        image = augment(jax.random.fold_in(key, _AUGMENT), batch["image"])
        return objective(params, state, batch | {"image": image}, key)

    return changed
