"""Transfers between devices, counted from compiled text."""

import jax
import jax.numpy as jnp

from w2s_jax import mesh as meshes
from w2s_jax.train.collectives import Traffic, traffic


def test_traffic_counts_what_a_loop_sends_every_turn() -> None:
    mesh = meshes.make_mesh("fsdp=8")
    rows, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    def f(x, n):
        def body(_, y):
            total = jax.lax.with_sharding_constraint(y.sum(0), whole)  # [4]: one all-reduce a turn
            return y + total[None]

        return jax.lax.fori_loop(0, n, body, x)

    x = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)
    text = jax.jit(f, static_argnums=1, out_shardings=rows).lower(x, 7).compile().as_text()
    assert traffic(text) == {"all-reduce": Traffic(7, 7 * 16)}


HLO = """HloModule m, is_scheduled=true

%piece.1 (p: bf16[4]) -> bf16[32] {
  ROOT %g.1 = bf16[32]{0:T(8)(2,1)} all-gather(%p), channel_id=3, dimensions={0}
}

%piece.2 (p: bf16[4]) -> bf16[32] {
  ROOT %g.2 = bf16[32]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%cond (c: (s32[], bf16[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body (c: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %a = bf16[32]{0} fusion(%x), kind=kLoop, calls=%piece.1
  %b = bf16[32]{0} fusion(%x), kind=kLoop, calls=%piece.2
  %cp = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%x), channel_id=4
  %cd = bf16[4]{0} collective-permute-done(%cp)
}

ENTRY %main (x: bf16[4]) -> bf16[4] {
  %w = (s32[], bf16[4]{0}) while(%t), condition=%cond, body=%body
  %r = (f32[10]{0}, f32[]) all-reduce(%y, %z), channel_id=9, to_apply=%add
}
"""


def test_pieces_of_one_transfer_count_once_and_turns_are_read_from_the_condition() -> None:
    assert traffic(HLO) == {
        "all-gather": Traffic(5, 5 * 64),
        "all-reduce": Traffic(1, 44),
        "collective-permute": Traffic(5, 5 * 8),
    }
