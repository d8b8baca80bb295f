"""Plans: what a compiled step needs, without running it and, for TPUs, without having one."""

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from w2s_jax import mesh as meshes
from w2s_jax.errors import UserError
from w2s_jax.models.config import Config, flops_per_token
from w2s_jax.models.transformer import params_count, transformer
from w2s_jax.objectives import language
from w2s_jax.train import drafts
from w2s_jax.train import plan as plans
from w2s_jax.train.drafts import draft
from w2s_jax.train.fit import fit
from w2s_jax.train.optim import Tune
from w2s_jax.train.plan import Plan, Sizes, advise, plan
from w2s_jax.train.topology import GIB, Topology, parse, topology
from w2s_jax.types import Table

TINY = Config(vocab=64, width=32, layers=2, heads=4, kv_heads=2, ffn=64, max_length=64, scan=True)
TUNE = Tune(lr=1e-3, batch=16, steps=4)


def drawn(method: str = "sft", tune: Tune = TUNE, config: Config = TINY, **more):
    """The recipe of a tiny step."""
    one = draft(config, method, tune, length=more.pop("length", 32), **more)
    return one.build(one.options)


def test_topologies_are_read_or_refused_in_one_line() -> None:
    assert parse("v5e:8x8") == ("v5e", (8, 8)) and parse("v5p:2x2x1") == ("v5p", (2, 2, 1))
    for name, words in {
        "v9:2x2": "unknown",
        "v5e": "unknown",
        "cpu:0": "unknown",
        "v5e:2x2x2": "takes 2 sizes, as in v5e:4x4",
        "v4:2x2": "takes 3 sizes",
        "cpu:2x2": "takes 1 sizes",
    }.items():
        with pytest.raises(UserError, match=words) as fault:
            parse(name)
        assert "\n" not in str(fault.value)
    with pytest.raises(UserError, match="has 8 CPU devices"):
        topology("cpu:9")


# The step on CPU devices


def test_the_parts_add_up_and_the_state_is_counted_exactly() -> None:
    recipe = drawn()
    found = plan(recipe, topology("cpu:8"), "fsdp=8")
    # weights and two moments; the norms (never split) whole, the matrices in eighths;
    # four counters; the key, from which nothing draws, is left out
    whole = 3 * 4 * (2 * 2 * 32 + 32)
    split = 3 * 4 * (params_count(TINY) - 5 * 32) // 8
    rows = 2 * 32 * 4 * 4
    assert found.sizes.arguments == whole + split + rows + 4 * 4
    assert found.sizes.peak == found.sizes.arguments + found.sizes.temporaries + found.sizes.program
    assert found.fits and found.tokens == 16 * 32
    assert found.flops == flops_per_token(TINY, 32) * 16 * 32


@pytest.mark.slow
def test_the_planned_program_is_the_one_that_runs(monkeypatch) -> None:
    ran = []
    real = plans.fits._program

    def watched(step, where, mesh):
        program = real(step, where, mesh)

        def run(*args):
            ran.append(program.lower(*args).compile().memory_analysis())
            return program(*args)

        return run

    model = transformer(TINY)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (16, 32)).astype(np.int32)
    columns = {
        "tokens": tokens,
        "segment": np.ones_like(tokens),
        "position": np.tile(np.arange(32, dtype=np.int32), (16, 1)),
        "mask": np.ones(tokens.shape, np.float32),
    }
    devices = meshes.make_mesh("fsdp=4,tensor=2")
    planned = plan(drawn(), topology("cpu:8"), "fsdp=4,tensor=2")
    monkeypatch.setattr(plans.fits, "_program", watched)
    fit(
        language(model),
        model.init(jax.random.key(0)),
        Table(columns),
        replace(TUNE, steps=1),
        jax.random.key(1),
        axes=model.axes,
        mesh=devices,
        progress=False,
    )
    (said,) = ran
    assert planned.sizes.arguments == said.argument_size_in_bytes
    fresh = said.output_size_in_bytes - said.alias_size_in_bytes
    assert planned.sizes.temporaries == pytest.approx(fresh + said.temp_size_in_bytes, rel=0.02)


@pytest.mark.slow
def test_what_saves_memory_is_seen_to_save_it() -> None:
    where = topology("cpu:8")
    deep = replace(TINY, width=64, layers=4, ffn=256)
    more = dict(config=deep, length=64)

    def need(tune: Tune = TUNE, **changes) -> Plan:
        return plan(drawn(tune=tune, **{**more, **changes}), where, "fsdp=2,data=4")

    base = need()
    assert need(replace(TUNE, micro=2)).sizes.temporaries < base.sizes.temporaries
    assert need(config=replace(deep, remat="full")).sizes.temporaries < base.sizes.temporaries
    state = params_count(deep) * 4 // 2
    halved = need(replace(TUNE, moments="bfloat16")).sizes.arguments
    assert base.sizes.arguments - halved == pytest.approx(
        state, rel=0.02
    )  # two moments, two bytes less
    adapted = need(rank=2)
    assert adapted.sizes.arguments < 0.5 * base.sizes.arguments
    # of 6 FLOPs per weight and token a frozen base needs 4
    assert adapted.flops < base.flops < 1.5 * adapted.flops


def test_dpo_at_a_large_vocabulary_has_no_logits_in_memory() -> None:
    """Whole logits of this batch would be 2 x 8 x 512 x 151,936 floats: 4.6 GiB."""
    config = replace(TINY, vocab=151_936, max_length=512, width=64, tie=True)
    tune = replace(TUNE, batch=8)
    one = plan(drawn("dpo", tune, config, length=512), topology("cpu:1"), "data=1")
    logits = 4 * 2 * 8 * 512 * config.vocab
    assert one.sizes.temporaries < 0.25 * logits
    assert one.sizes.peak < 1.5 * GIB


@pytest.mark.slow
def test_the_prompt_of_a_pair_is_paid_once() -> None:
    where = topology("cpu:1")
    apart = plan(drawn("dpo", length=64), where)
    shared = plan(drawn("dpo", length=64, prompt=48), where)
    assert (apart.tokens, shared.tokens) == (16 * 128, 16 * 80)
    assert shared.flops / apart.flops == pytest.approx(80 / 128)


@pytest.mark.slow
def test_distillation_holds_its_teacher() -> None:
    where = topology("cpu:8")
    teacher = replace(TINY, width=128, ffn=512)
    stored = plan(drawn("kd"), where, "fsdp=8")
    live = plan(drawn("kd", teacher=teacher), where, "fsdp=8")
    held = params_count(teacher) * 4 / 8
    kept = 2 * 32 * (drafts.TOP * 6 + 4)  # the stored columns of two rows
    assert live.sizes.arguments - stored.sizes.arguments == pytest.approx(held - kept, rel=0.1)
    extra = flops_per_token(teacher, 32) / 3 * 16 * 32
    assert live.flops == pytest.approx(stored.flops + extra)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: plan(drawn(), topology("cpu:8"), "fsdp=3"), "3 devices.*there are 8"),
        (lambda: plan(drawn(tune=replace(TUNE, micro=4)), topology("cpu:8"), "fsdp=8"),
         "batch 16 in 4 micro-batches does not divide over data x fsdp = 8"),
        (lambda: drawn(length=65), "65 tokens exceed the 64"),
        (lambda: drawn("dpo", prompt=32), "no room for a prompt of 32"),
        (lambda: drawn("rlhf"), "'rlhf' is unknown; choose one of sft, dpo, kd, gkd"),
        (lambda: drawn("gkd", prompt=8), "gkd needs a live teacher"),
        (lambda: drawn("gkd", teacher=TINY), "the length of the prompts it answers"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_line(ask, words) -> None:
    with pytest.raises(UserError, match=words) as fault:
        ask()
    assert "\n" not in str(fault.value)


@pytest.mark.slow
def test_on_policy_distillation_samples_without_a_word_between_devices() -> None:
    """The student is gathered once a step: of the drawing of a token only its end is agreed on. The
    teacher, whose vocabulary has more padding, is spread and never copied whole."""
    import re

    where, teacher = topology("cpu:8"), replace(TINY, vocab=72, width=128, ffn=512)
    recipe = drawn("gkd", prompt=16, teacher=teacher)
    assert set(recipe.batch) == {"asked"} and recipe.tokens == 16 * 32
    found = plan(recipe, where, "fsdp=8")
    state, held = 3 * params_count(TINY) * 4 / 8, params_count(teacher) * 4 / 8
    assert found.fits and found.sizes.arguments == pytest.approx(state + held, rel=0.05)
    passed = flops_per_token(TINY, 32) * 4 / 3 + flops_per_token(teacher, 32) / 3
    assert found.flops == pytest.approx(passed * 16 * 32)
    lowered = plans._lower(recipe, meshes.make_mesh("fsdp=8", where.devices))
    sent = re.compile(r"= (\S+) (?:all-|reduce-scatter|collective).*jvp\(\)/while/(\w+)")
    inside = {m.groups() for m in map(sent.search, lowered.compile().as_text().splitlines()) if m}
    assert inside == {("pred[]", "cond")}


def test_the_default_mesh_keeps_every_device_busy() -> None:
    where = topology("cpu:8")
    for batch, micro, spec in (
        (16, 1, "fsdp=8"),
        (16, 4, "fsdp=4,tensor=2"),
        (4, 2, "fsdp=2,tensor=4"),
    ):
        recipe = drawn(tune=replace(TUNE, batch=batch, micro=micro))
        assert plans.default_mesh(recipe, where) == spec


# What does not fit


def pretended(where: Topology, peak: int, fits: bool) -> Plan:
    """A plan of which only the peak matters."""
    return Plan(where, "m", Sizes(1, 0, 0, peak), fits, {}, 0.0, 0, 0.0, 0.0)


def small(where: Topology, memory: int) -> Topology:
    return replace(where, memory=memory)


@pytest.mark.slow
def test_the_cheapest_changes_that_make_it_fit() -> None:
    where, flags = topology("cpu:1"), {"micro": "--micro", "moments": "--moments"}
    one = draft(TINY, "sft", TUNE, length=32, flags=flags)
    full = plan(one.build(one.options), where)
    found = list(advise(one, small(where, full.sizes.peak - 1000)))
    assert [flag for flag, _ in found] == ["--micro 2", "--moments bfloat16"]
    assert all(better.fits and better.sizes.peak < full.sizes.peak for _, better in found)
    assert list(advise(one, small(where, full.sizes.arguments // 2))) == []  # not even the weights


def test_combinations_are_tried_when_no_single_change_is_enough(monkeypatch) -> None:
    tried = []

    def pretend(recipe, where, mesh=None):
        tune = recipe.tune
        saved = 30 * (tune.micro > 1) + 40 * (tune.moments == "bfloat16") + 60 * (tune.batch < 16)
        tried.append((tune.micro, tune.moments, tune.batch))
        return pretended(where, 100 - saved, saved >= 70)

    monkeypatch.setattr(plans, "plan", pretend)
    flags = {"micro": "-m", "moments": "-o", "batch": "-b"}  # micro 8 does not divide batch 4
    one = draft(TINY, "sft", TUNE, length=32, flags=flags)
    found = [said for said, _ in advise(one, topology("cpu:1"))]
    assert found == ["-m 2 -o bfloat16", "-m 2 -b 8"]
    assert len(set(tried)) == len(tried)


def test_a_plan_that_does_not_fit_says_so(capsys, monkeypatch) -> None:
    def pretend(recipe, where, mesh=None):
        peak = 2 * GIB // recipe.tune.micro
        return pretended(where, peak, peak <= GIB)

    monkeypatch.setattr(plans, "plan", pretend)
    monkeypatch.setattr(plans, "topology", lambda name: small(topology(name), GIB))
    one = draft(TINY, "sft", TUNE, length=32, flags={"micro": "--micro"}, name="tiny")
    assert plans.report(one, "cpu:1") == 3
    said = capsys.readouterr().out
    assert "tiny sft, rows of 32 tokens, batch 16" in said and "200% of 1.00 GiB" in said
    assert "DOES NOT FIT" in said
    assert said.endswith("  1. --micro 2: 1.00 GiB per device (100%), mesh m\n")
    rich = replace(one, options=replace(one.options, micro=2))
    assert plans.report(rich, "cpu:1") == 0
    assert ": fits" in capsys.readouterr().out
    assert plans.report(replace(one, flags={}), "cpu:1") == 3
    assert "none found: take more devices" in capsys.readouterr().out


def test_the_compilers_refusal_is_a_size() -> None:
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (21.50G) exceeds available HBM (15.75G)."
    )
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.0M of 256.0M hbm."
    assert plans._needed(early) == int(21.5 * GIB)
    assert plans._needed(late) == GIB // 2
    assert plans._needed("RESOURCE_EXHAUSTED: other") == 0
    assert plans._needed("INVALID_ARGUMENT: Used 1G of") is None


# The command


def run(*argv: str, **env: str) -> subprocess.CompletedProcess:
    import os

    command = [sys.executable, "-m", "w2s_jax.train.plan", *argv]
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **env})


@pytest.mark.slow
def test_the_command_simulates_its_own_devices() -> None:
    small = ("--model", "nano-1", "--method", "sft", "--length", "64", "--batch", "16")
    done = run(*small, "--topology", "cpu:16")
    assert done.returncode == 0, done.stderr
    assert "cpu:16: 16 simulated devices" in done.stdout and "mesh fsdp=16" in done.stdout
    done = run(*small, "--topology", "v5x:2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: topology 'v5x:2' is unknown")


# TPUs that are not there


def test_without_libtpu_one_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match="needs libtpu: pip install"):
        topology("v5e:2x2")


@pytest.fixture
def tpus(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    return topology


@pytest.mark.parametrize(
    ("name", "count", "memory"),
    [
        ("v4:2x2x2", 8, 30.75),
        ("v5e:8x8", 64, 15.75),
        ("v5p:2x2x1", 4, 95.74),
        ("v6e:4x4", 16, 31.25),
    ],
)  # fmt: skip
def test_slices_have_one_device_per_chip(tpus, name, count, memory) -> None:
    where = tpus(name)
    assert len(where.devices) == count and where.memory == int(memory * GIB)
    assert {device.platform for device in where.devices} == {"tpu"}


def test_slices_that_do_not_exist_are_one_line(tpus) -> None:
    with pytest.raises(UserError, match="v5e:3x3.*does not exist") as fault:
        tpus("v5e:3x3")
    assert "\n" not in str(fault.value)


@pytest.mark.slow
def test_a_step_compiles_for_a_slice(tpus) -> None:
    config = replace(
        TINY, dtype="bfloat16", max_length=256, width=128, heads=2, kv_heads=1, vocab=512
    )
    found = plan(drawn("dpo", config=config, length=256), tpus("v5e:2x4"), "fsdp=8")
    assert found.fits and found.traffic and found.sizes.arguments < found.sizes.peak
    assert "8 chips" in str(found) and "s at peak" in str(found)


@pytest.mark.slow
def test_the_head_is_cut_for_the_devices_planned_for(tpus) -> None:
    """An accelerator takes larger chunks of logits than this CPU would."""
    from w2s_jax.losses import sequence

    seen = []
    with meshes.rules_context(meshes.make_mesh("fsdp=4", tpus("v5e:2x2").devices)):
        seen.append(sequence._chunk(1000))
    with meshes.rules_context(meshes.make_mesh("fsdp=4", jax.devices()[:4])):
        seen.append(sequence._chunk(1000))
    assert seen[0] > 3 * seen[1]


@pytest.mark.slow
def test_a_stored_reference_is_no_second_model() -> None:
    where = topology("cpu:8")
    one, pair = plan(drawn("sft"), where, "fsdp=8"), plan(drawn("dpo"), where, "fsdp=8")
    assert pair.sizes.arguments == pytest.approx(one.sizes.arguments, rel=0.05)
