"""The benchmark harness: turns, ratios, refusals; our sides at toy sizes."""

import json
import os

import numpy as np
import pytest

from benchmarks import b03, b12, world
from benchmarks.__main__ import listing, main
from benchmarks.harness import Result, Settings, Side, alternate, call, cores, environment, fresh
from benchmarks.report import disagreement, ratio, report, several
from w2s_jax.errors import UserError

HERE = "tests.test_benchmarks:"
THREE = Settings(blocks=3)


def result(name: str, cpu: list[float], units: float = 1.0, **info) -> Result:
    """A contender that has had its turns, one step each."""
    rows = [{"cpu": c, "wall": 2 * c, "units": units, "steps": 1} for c in cpu]
    return Result(Side(name, ""), info, rows)


# sides of the process tests; the children import this file


def noting(turn, path: str, name: str, loss0: float) -> None:
    """Write the name at every turn."""

    def block(steps: int) -> dict[str, float]:
        with open(path, "a", encoding="utf8") as file:
            file.write(f"{name}{steps} ")
        return {"units": 4.0 * steps}

    turn.serve(block, loss0=loss0)


def where(turn) -> None:
    """Say what this process was given."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    names = ("OMP_NUM_THREADS", "XLA_FLAGS", "GLIBC_TUNABLES")
    turn.ready(cores=affinity, **{name: os.environ.get(name) for name in names})


def broken(turn) -> None:
    """Fail before the first turn."""
    raise UserError("no such model")


def dying(turn) -> None:
    """End without a word in the first turn."""
    turn.serve(lambda steps: os._exit(3), loss0=1.0)


def test_ratio_is_the_median_of_the_blocks() -> None:
    peer, ours = result("TRL", [4.0, 6.0, 9.0], units=2.0), result("ours", [1.0, 2.0, 1.5])
    # per unit 2, 3, 4.5 against 1, 2, 1.5
    assert ratio(peer, ours) == {"median": 2.0, "min": 1.5, "max": 3.0}
    assert ratio(result("TRL", []), ours) is None


def test_report_leads_with_the_first_peer_and_names_what_failed() -> None:
    gone = Result(Side("other", ""), error="other needs trl: pip install 'w2s_jax[parity]'")
    sides = [result("TRL", [3.0, 3.0], loss0=0.7), gone, result("ours", [1.0, 1.5], loss0=0.7)]
    line = report("B0", sides, Settings(), unit="pairs", agree={"loss0": 1e-3})
    assert line["ratio"] == 2.5 and line["spread"] == [2.0, 3.0] and line["against"] == "TRL"
    assert line["sides"]["other"] == {"failed": gone.error}
    assert line["sides"]["ours"]["units_per_wall"] == pytest.approx(np.median([1 / 2, 1 / 3]))
    assert {"versions", "threads", "cpu"} <= set(line)
    assert json.loads(json.dumps(line)) == line


def test_no_ratio_when_the_sides_disagree() -> None:
    sides = [result("TRL", [3.0], loss0=0.7), result("ours", [1.0], loss0=0.7008)]
    assert disagreement(sides, {"loss0": 2e-3}) == ""
    with pytest.raises(UserError, match="disagree in loss0: TRL 0.7, ours 0.7008"):
        report("B0", sides, Settings(), unit="pairs", agree={"loss0": 1e-3})
    nan = [result("TRL", [3.0], loss0=0.7), result("ours", [1.0], loss0=float("nan"))]
    assert disagreement(nan, {"loss0": 1e-3})


def test_several_cases_lead_with_the_worst() -> None:
    lines = {
        "a": report("B0", [result("TRL", [6.0]), result("ours", [2.0])], Settings(), unit="x"),
        "b": report("B0", [result("TRL", [5.0]), result("ours", [2.0])], Settings(), unit="x"),
    }
    line = several(lines)
    assert line["ratio"] == 2.5 and line["case"] == "b" and set(line["cases"]) == {"a", "b"}


def test_the_reference_pass_is_charged_to_both_sides() -> None:
    theirs = result("TRL", [5.0], reference_cpu=3.0, reference_wall=2.0)
    ours = result("ours", [1.0], reference_cpu=0.5, reference_wall=0.5, pack_cpu=0.5, pack_wall=0.0)
    # cpu 8 against 2, wall 12 against 2.5
    assert b03.charged([theirs, ours]) == {"TRL": {"cpu": 4.0, "wall": 4.8}}


def test_contenders_take_turns_in_order(tmp_path) -> None:
    path = tmp_path / "turns"
    options = {"path": str(path), "loss0": 1.0}
    sides = [
        Side("peer", f"{HERE}noting", options | {"name": "p"}),
        Side("gone", f"{HERE}noting", needs=("no_such_package",)),
        Side("bad", f"{HERE}broken"),
        Side("late", f"{HERE}dying"),
        Side("ours", f"{HERE}noting", options | {"name": "o"}),
    ]
    results = {r.side.name: r for r in alternate(sides, THREE, steps=2)}
    assert path.read_text() == "p2 o2 " * 3
    assert [row["units"] for row in results["ours"].rows] == [8.0] * 3
    assert results["gone"].error == "gone needs no_such_package: pip install 'w2s_jax[parity]'"
    assert results["bad"].error.startswith("bad failed: ")
    assert results["bad"].error.endswith("no such model")
    assert results["late"].error == "late failed: it ended with code 3 and said nothing"


def test_threads_and_cores_are_fixed(monkeypatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    (row,) = fresh([Side("ours", f"{HERE}where")], Settings(blocks=1))[0].rows
    assert row["OMP_NUM_THREADS"] == "1" and row["cores"] in ([], cores(1))
    assert row["XLA_FLAGS"] is None and row["GLIBC_TUNABLES"] is None
    assert row["total"] > 0 and row["cpu"] > 0 and row["peak"] >= row["rss"] > 0
    tuned = environment(Side("peer", "", tuned=True), Settings())
    assert "glibc.malloc.hugetlb=1" in tuned["GLIBC_TUNABLES"]
    with pytest.raises(UserError, match="--threads 4096"):
        cores(4096)


def test_a_failed_helper_is_one_line() -> None:
    with pytest.raises(UserError, match="no such model"):
        call(f"{HERE}broken")


def test_unknown_names_are_one_line(capsys) -> None:
    assert main(["B99"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="--sides x: the contenders are ours"):
        alternate([Side("ours", "")], Settings(sides="x"), steps=1)


def test_every_benchmark_is_listed(capsys) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == list(listing())
    assert all(len(line) > 20 for line in told)
    assert {f"B{i}" for i in (1, 2, 3, 4, 5, 7, 8, 12, 13, 14, 15, 16)} <= set(listing())


def test_data_are_the_same_for_everyone_and_fit() -> None:
    made = world.pairs(50, 300, world.RAGGED)
    assert made == world.pairs(50, 300, world.RAGGED)
    for pair in made:
        assert len(pair["prompt"]) + max(map(len, (pair["chosen"], pair["rejected"]))) <= 1024
        assert all(world.FIRST <= i < 300 for ids in pair.values() for i in ids)
    assert world.rows(50, 300, world.RAGGED)[7]["completion"] == made[7]["chosen"]
    one = [{"prompt": [1, 2], "chosen": [3], "rejected": [4, 5, 6]}]
    assert world.tokens(one) == 3 + 5
    assert world.describe(one)["mean_completion"] == 2.0


def test_gradients_are_compared_to_the_largest_entry() -> None:
    theirs = np.array([1.0, -4.0])
    assert b12.difference(np.array([1.0, -3.0]), theirs) == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in listing() if name not in ("B9", "B12")])
def test_our_side_runs(name: str, capfd) -> None:
    """Ours alone: no peer is needed, and no ratio is claimed."""
    named = {"B13": "token_nll", "B14": "SFT 0.5B", "B15": "0.5B", "B17": "dpo"}
    named |= {"B18": "forward_kl"}
    sides = named.get(name, "ours")
    assert main([name, "--tiny", "--blocks", "1", "--sides", sides]) == 0
    line = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert line["benchmark"] == name and line["quick"]
    assert line.get("against") != "TRL" and line.get("ratio") is None
