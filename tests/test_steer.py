"""Logit arithmetic by hand and by brute force; the decoding loop beside passes without a cache."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from w2s_jax.data import arithmetic
from w2s_jax.errors import UserError
from w2s_jax.generate import steer_programs
from w2s_jax.generate.steer import GRID, displacement, fused, golden, grid, proxy
from w2s_jax.generate.steer_loop import crew, decode, generate, score
from w2s_jax.models.transformer import Config, transformer
from w2s_jax.tokenizer import train_bpe
from w2s_jax.types import Table

RNG = np.random.default_rng(0)
LARGE, BASE = (RNG.normal(size=(6, 50)).astype(np.float32) * 2 for _ in range(2))
EXPERTS = (BASE[None] + RNG.normal(size=(3, 6, 50)) * 1.5).astype(np.float32)
ALPHAS = np.linspace(0, 2, 21)


def kl(p, q):
    return (np.exp(p) * (p - q)).sum(-1)


def objective(large, base, experts, which, alpha):
    """The sum over experts of both squared mismatches, in float64, from the definition."""
    p, q, e = (log_softmax(x.astype(np.float64), -1) for x in (large, base, experts))
    r = log_softmax(p + alpha * (e[which] - q), -1)
    there = (kl(r, p) - kl(e, q)) ** 2
    return (there + (kl(p, r) - kl(q, e)) ** 2).sum(0)


def brute(large, base, experts):
    """Best (alpha, expert) of the grid for every row."""
    found = np.array(
        [[objective(large, base, experts, s, a) for s in range(len(experts))] for a in ALPHAS]
    )
    best = found.reshape(-1, large.shape[0]).argmin(0)
    return ALPHAS[best // len(experts)], best % len(experts)


def test_proxy_by_hand() -> None:
    large, base, expert = (jnp.log(jnp.array(p)) for p in ([0.5, 0.5], [0.5, 0.5], [0.8, 0.2]))
    got = proxy(large[None], base[None], expert[None, None])
    np.testing.assert_allclose(np.exp(got.logps), [[0.8, 0.2]], atol=1e-6)
    got = proxy(large[None], base[None], expert[None, None], alpha=2.0)
    np.testing.assert_allclose(np.exp(got.logps), [[16 / 17, 1 / 17]], atol=1e-6)
    assert got.alpha == 2 and got.expert == 0
    none = proxy(LARGE, BASE, EXPERTS, alpha=0.0)
    np.testing.assert_allclose(none.logps, log_softmax(LARGE, -1), atol=1e-5)
    assert (none.expert == -1).all()


def test_contrastive_decoding_is_proxy_of_the_large_model() -> None:
    got = proxy(LARGE, BASE, LARGE[None], alpha=0.5).logps
    np.testing.assert_allclose(got, log_softmax(1.5 * LARGE - 0.5 * BASE, -1), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_the_grid_finds_what_brute_force_finds(count) -> None:
    alpha, expert = brute(LARGE, BASE, EXPERTS[:count])
    got = fused(LARGE, BASE, EXPERTS[:count])
    np.testing.assert_allclose(got.alpha, alpha, atol=1e-6)
    np.testing.assert_array_equal(got.expert, expert)
    e, q = log_softmax(EXPERTS, -1), log_softmax(BASE, -1)
    shift = np.stack([e[s, i] - q[i] for i, s in enumerate(expert)])
    want = log_softmax(log_softmax(LARGE, -1) + alpha[:, None] * shift, -1)
    np.testing.assert_allclose(got.logps, want, atol=1e-5)
    assert len(set(alpha)) > 2, "a constant answer would prove little"
    if count == 1:
        again = fused(LARGE, BASE, EXPERTS[:1], search=partial(grid, chunk=4))
        np.testing.assert_array_equal(again.alpha, got.alpha)


def test_golden_section_agrees_with_the_grid() -> None:
    coarse = fused(LARGE, BASE, EXPERTS[:1])
    fine = fused(LARGE, BASE, EXPERTS[:1], search=partial(golden, evaluations=16))
    np.testing.assert_allclose(fine.alpha, coarse.alpha, atol=0.051)
    for a, f, row in zip(coarse.alpha, fine.alpha, range(6), strict=True):
        parts = (LARGE[[row]], BASE[[row]], EXPERTS[:1, [row]])
        assert objective(*parts, 0, float(f)) <= objective(*parts, 0, float(a)) + 1e-6


def test_alpha_is_one_where_the_large_model_is_the_base() -> None:
    got = fused(BASE, BASE, EXPERTS[:1])
    np.testing.assert_array_equal(got.alpha, 1.0)
    np.testing.assert_allclose(got.logps, log_softmax(EXPERTS[0], -1), atol=1e-5)
    scaled = fused(BASE, BASE, BASE[None] + 1e-2 * (EXPERTS[:1] - BASE[None]))
    np.testing.assert_array_equal(scaled.alpha, 1.0)


def test_ties_take_the_smaller_weight_and_nobody_acts() -> None:
    got = fused(LARGE, BASE, np.stack([BASE, BASE]))
    np.testing.assert_array_equal(got.alpha, 0.0)
    np.testing.assert_array_equal(got.expert, -1)
    twice = fused(LARGE, BASE, np.stack([EXPERTS[0], EXPERTS[0]]))
    once = fused(LARGE, BASE, EXPERTS[:1])
    np.testing.assert_array_equal(twice.alpha, once.alpha)
    np.testing.assert_array_equal(twice.expert, 0)


@pytest.mark.parametrize("search", [grid, golden])
@pytest.mark.parametrize("which", [0, 1])
def test_an_expert_that_is_not_a_number_is_not_left_out_in_silence(search, which) -> None:
    broken = EXPERTS[:2].copy()
    broken[which, 3] = np.nan
    got = fused(LARGE, BASE, broken, search=search)
    np.testing.assert_array_equal(np.isnan(got.logps).any(-1), np.arange(6) == 3)
    assert (got.alpha[3], got.expert[3]) == (0, -1)


@pytest.mark.parametrize("rule", [fused, proxy, partial(fused, search=golden)])
def test_a_token_that_nobody_says_changes_nothing(rule) -> None:
    def excluded(logits):
        return np.insert(logits, 7, -np.inf, axis=-1)

    want = rule(LARGE, BASE, EXPERTS)
    got = rule(*map(excluded, (LARGE, BASE, EXPERTS)))
    np.testing.assert_allclose(got.logps, excluded(want.logps), atol=1e-5)
    np.testing.assert_allclose(got.alpha, want.alpha, atol=1e-5)
    np.testing.assert_array_equal(got.expert, want.expert)


@pytest.mark.parametrize("rule", [fused, proxy])
def test_constants_do_not_matter(rule) -> None:
    want = rule(LARGE, BASE, EXPERTS)
    got = rule(LARGE + 3, BASE - 7, EXPERTS + np.array([1, 20, -5])[:, None, None])
    np.testing.assert_allclose(got.logps, want.logps, atol=1e-4)
    np.testing.assert_array_equal(got.expert, want.expert)


def test_displacement_is_both_divergences() -> None:
    p, shift, alpha = log_softmax(LARGE, -1), EXPERTS[0], np.full(6, 0.7, np.float32)
    r = log_softmax(p + 0.7 * shift, -1)
    there, here = displacement(p, shift, alpha)
    np.testing.assert_allclose(there, kl(r, p), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(here, kl(p, r), rtol=1e-3, atol=1e-5)


# The loop ----------------------------------------------------------------------------------------

TOKENIZER = arithmetic.tokenizer()
VOCAB = TOKENIZER.size
SMALL = Config(vocab=VOCAB, width=16, layers=1, heads=2, kv_heads=2, max_length=64, pad_vocab=16)
WIDE = Config(vocab=VOCAB + 5, width=24, layers=2, heads=2, kv_heads=1, max_length=64)
KEY = jax.random.key(5)
PROMPTS = [RNG.integers(4, VOCAB, n).tolist() for n in (3, 12, 1, 40)]


def member(config, seed, scale=2.0):
    model = transformer(config)
    params = jax.tree.map(lambda leaf: scale * leaf, model.init(jax.random.key(seed)))
    return model, params, TOKENIZER


@pytest.fixture(scope="module")
def models():
    return member(WIDE, 0), member(SMALL, 1), [member(SMALL, 2), member(SMALL, 3)]


@pytest.fixture(scope="module")
def people(models):
    return crew(*models)


@pytest.fixture(scope="module")
def walked(people):
    return decode(people, fused, PROMPTS, KEY, tokens=6, temperature=1.3)


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    out = model.apply(params, tokens)
    return (out.hidden[0] @ out.unembed)[:, :VOCAB]


def plain(loaded, ids):
    """Logits [T,V] of one text in one pass, without a cache."""
    whole = np.zeros((1, 64), np.int32)
    whole[0, : len(ids)] = ids
    return np.asarray(forward(*loaded[:2], whole))[: len(ids)]


def test_steps_are_those_of_passes_without_a_cache(models, walked) -> None:
    large, base, experts = models
    acted = set()
    for prompt, row in zip(PROMPTS, walked, strict=True):
        text, at = [*prompt, *row.ids.tolist()], len(prompt) - 1
        said = [plain(one, text)[at:-1] for one in (large, base, *experts)]
        want = fused(said[0], said[1], np.stack(said[2:]))
        logps = np.take_along_axis(np.asarray(want.logps), row.ids[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(row.logps, logps, atol=1e-3)
        np.testing.assert_allclose(row.alpha, want.alpha, atol=1e-6)
        np.testing.assert_array_equal(row.expert, want.expert)
        acted |= set(row.expert.tolist())
        assert len(row.ids) == 6 and row.finish == "length"
    assert {0, 1} <= acted


def test_given_texts_score_as_decoding_said(people, walked) -> None:
    size = max(len(p) + 6 for p in PROMPTS)
    tokens, mask = np.zeros((4, size), np.int32), np.zeros((4, size), np.float32)
    for i, (prompt, row) in enumerate(zip(PROMPTS, walked, strict=True)):
        text = [*prompt, *row.ids.tolist()]
        tokens[i, : len(text)], mask[i, len(prompt) : len(text)] = text, 1
    table = Table({"tokens": tokens, "mask": mask})
    got = score(people, fused, table, batch=3, chunk=4)
    for i, row in enumerate(walked):
        asked = mask[i] > 0
        np.testing.assert_allclose(got.logps[i][asked], row.logps, atol=1e-3)
        np.testing.assert_allclose(got.alpha[i][asked], row.alpha, atol=1e-6)
        np.testing.assert_array_equal(got.expert[i][asked], row.expert)
        assert not got.logps[i][~asked].any()


@pytest.mark.slow
def test_neighbours_and_padding_do_not_matter(people, walked) -> None:
    again = decode(people, fused, PROMPTS[:2], KEY, tokens=6, temperature=1.3, batch=1)
    for one, other in zip(walked, again, strict=False):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)


def test_weight_zero_is_the_large_model_and_ends_are_kept(models, people) -> None:
    rule = partial(proxy, alpha=0.0)
    greedy = [row.ids.tolist() for row in decode(people, rule, PROMPTS, KEY, tokens=6)]
    for prompt, ids in zip(PROMPTS, greedy, strict=True):
        said = plain(models[0], [*prompt, *ids])[len(prompt) - 1 : -1]
        assert said.argmax(-1).tolist() == ids
    end = greedy[1][2]
    stopped = decode(people, rule, PROMPTS, KEY, tokens=6, stop=[end])
    assert stopped[1].ids.tolist() == greedy[1][: greedy[1].index(end)]
    assert stopped[1].finish == "stop"


def test_experts_may_read_another_prompt(people) -> None:
    others = [prompt[1:] or [9] for prompt in PROMPTS]

    def first(alpha, **how):
        rows = decode(people, partial(proxy, alpha=alpha), PROMPTS, KEY, tokens=6, **how)
        return np.array([row.logps[0] for row in rows])

    np.testing.assert_allclose(first(0.0), first(0.0, expert_prompts=others), atol=1e-5)
    assert np.abs(first(1.0) - first(1.0, expert_prompts=others)).max() > 1e-3


def test_tables_of_other_lengths_share_a_program(people) -> None:
    def table(asked: int) -> Table:
        mask = np.zeros((2, 24), np.float32)
        mask[0, 1 : asked + 1] = 1
        return Table({"tokens": np.full((2, 24), 9, np.int32), "mask": mask})

    how = steer_programs.parts(proxy)
    program = steer_programs.scorer(people.groups, how.fixed, people.vocab, 5)
    scores = [score(people, proxy, table(asked), chunk=5) for asked in (3, 12, 23)]
    assert program._cache_size() == 1
    for asked, got in zip((3, 12, 23), scores, strict=True):
        np.testing.assert_allclose(got.logps[0, 1 : asked + 1], scores[2].logps[0, 1 : asked + 1])
        assert not got.logps[0, asked + 1 :].any() and not got.logps[1].any()


def test_a_tokenizer_may_have_more_tokens_than_a_model(models) -> None:
    large, base, experts = models
    short = member(replace(SMALL, vocab=VOCAB - 2, pad_vocab=1), 4)
    people = crew(large, base, [experts[0], short])
    assert people.vocab == VOCAB - 2
    assert max(max(row.ids) for row in decode(people, fused, PROMPTS[2:3], KEY, tokens=2)) < VOCAB


def test_tables_of_texts(people) -> None:
    asked = ["q : amy has 3 pens .", "q : liz has 4 eggs .", *PROMPTS[2:]]
    prompts = np.empty(4, object)
    prompts[:] = asked
    got = generate(Table({"prompt": prompts}), people, proxy, key=KEY, tokens=6)
    for row in range(4):
        assert len(got["alpha"][row]) == len(got["response_ids"][row]) <= 6
        assert got["response"][row] == TOKENIZER.decode(got["response_ids"][row])
    assert set(got["finish"]) <= {"stop", "length"}


def test_bad_inputs_are_said(models, people) -> None:
    large, base, experts = models
    other = (*base[:2], train_bpe(["amy has 3 pens"] * 3, 300))
    with pytest.raises(UserError, match="one vocabulary"):
        crew(large, base, [other])
    with pytest.raises(UserError, match="at least one expert"):
        crew(large, base, [])
    with pytest.raises(UserError, match="is empty"):
        decode(people, proxy, [[]], KEY, tokens=2)
    with pytest.raises(UserError, match="outside 0"):
        decode(people, proxy, [[VOCAB]], KEY, tokens=2)
    with pytest.raises(UserError, match="exceed"):
        decode(people, proxy, [[5] * 60], KEY, tokens=20)
    with pytest.raises(UserError, match="need one each"):
        decode(people, proxy, PROMPTS, KEY, tokens=2, expert_prompts=PROMPTS[:1])
    with pytest.raises(UserError, match="nothing"):
        score(people, proxy, Table({"tokens": np.ones((1, 4), np.int32), "mask": np.zeros((1, 4))}))
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, base[1])
    faulty = crew(large, base, [experts[0], (base[0], broken, TOKENIZER)])
    told = Table({"tokens": np.full((2, 8), 9, np.int32), "mask": np.ones((2, 8))})
    for rule in (proxy, fused):
        with pytest.raises(UserError, match="not finite"):
            decode(faulty, rule, PROMPTS, KEY, tokens=6)
        with pytest.raises(UserError, match="row 0.*not finite"):
            score(faulty, rule, told)


def test_the_grid_holds_the_weight_of_proxy_tuning() -> None:
    assert 1.0 in GRID and (min(GRID), max(GRID), len(GRID)) == (0.0, 2.0, 21)
