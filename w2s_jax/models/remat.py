"""What the backward pass keeps of a layer and what it makes again: one name per policy.

Kept per token and layer, in numbers of the compute dtype, besides the layer's input (D): width D,
H h query and K h key (or value) channels, F feed-forward channels. Forward work repeated, of a
layer's products. On GPUs and TPUs fused attention keeps no [T, T] scores under any policy.

| remat     | kept on the device          | repeated in the backward pass                         |
|-----------|-----------------------------|-------------------------------------------------------|
| none      | every intermediate          | nothing                                               |
| dots      | 2 H h + 2 K h + 2 D + 2 F   | attention scores, norms, activations                  |
| attention | 2 H h + 2 K h               | output projection and feed-forward, scores, norms     |
| outputs   | H h + D                     | all products that read the layer's input              |
| full      | nothing                     | everything                                            |
| offload   | nothing; 2 H h + 2 K h on the host | as "attention", and two transfers              |

(F counts twice for swiglu, once for gelu.) "dots" suits short rows and small models, "attention"
long rows, "offload" a device that "attention" just does not fit, where the link to the host is
fast; "full" is the last resort.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

_POLICIES = jax.checkpoint_policies
_KEPT = ("qkv", "attention")  # names given by ``checkpoint_name`` in a layer

_SAVED: dict[str, Callable[..., Any]] = {
    "full": _POLICIES.nothing_saveable,
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "attention": _POLICIES.save_only_these_names(*_KEPT),
    "outputs": _POLICIES.save_only_these_names("attention", "ffn"),
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_KEPT),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def policy(remat: str) -> Callable[..., Any]:
    """The ``jax.checkpoint`` policy of a name other than "none"."""
    return _SAVED[remat]
