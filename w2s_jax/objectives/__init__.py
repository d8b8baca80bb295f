"""Objectives: a loss and the forward passes it needs; all that ``fit`` knows of a method."""

from w2s_jax.objectives.augmented import augmented
from w2s_jax.objectives.base import at, classify, language, on_base, predicted
from w2s_jax.objectives.contrast import remembered
from w2s_jax.objectives.distillation import distill, distill_classes
from w2s_jax.objectives.features import (
    Head,
    Term,
    match,
    match_memory,
    mutual,
    weighted,
    with_projections,
)
from w2s_jax.objectives.on_policy import minillm, on_policy, sequence_kl
from w2s_jax.objectives.pairs import prefer, response_logps
from w2s_jax.objectives.policy import policy_logps, reinforce
from w2s_jax.objectives.rewards import rank, response_rewards
from w2s_jax.objectives.selective import selective, selective_memory
from w2s_jax.objectives.spans import distill_spans, span_logps
from w2s_jax.objectives.taid import taid, taid_classes, taid_memory
from w2s_jax.objectives.temperature import (
    curriculum,
    curriculum_classes,
    curriculum_instances,
    with_predictor,
    with_temperature,
)
from w2s_jax.objectives.unpaired import unpaired

__all__ = [
    "Head",
    "Term",
    "at",
    "augmented",
    "classify",
    "curriculum",
    "curriculum_classes",
    "curriculum_instances",
    "distill",
    "distill_classes",
    "distill_spans",
    "language",
    "match",
    "match_memory",
    "minillm",
    "mutual",
    "on_base",
    "on_policy",
    "policy_logps",
    "predicted",
    "prefer",
    "rank",
    "reinforce",
    "remembered",
    "response_logps",
    "response_rewards",
    "selective",
    "selective_memory",
    "sequence_kl",
    "span_logps",
    "taid",
    "taid_classes",
    "taid_memory",
    "unpaired",
    "weighted",
    "with_predictor",
    "with_projections",
    "with_temperature",
]
