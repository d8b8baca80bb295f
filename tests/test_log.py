"""Rows on disk, trackers, rates, progress."""

import builtins
import json
from types import SimpleNamespace

import numpy as np
import pytest

from w2s_jax.errors import UserError
from w2s_jax.train.log import Log, Meter, Progress, peak_flops, real_tokens


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().split()]


def write(folder, steps, **kwargs):
    log = Log(folder, **kwargs)
    for step in steps:
        log.write(step, {"loss": 1.0})
    log.close()


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step":{i}}}\n' for i in range(5)) + '{"step":5,"lo')
    write(tmp_path, [3, 4], step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_starting_afresh_drops_everything(tmp_path):
    write(tmp_path, [0, 1])
    write(tmp_path, [0])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 1.0}\n'


def test_numbers_survive_exactly(tmp_path):
    log = Log(tmp_path)
    value = float(np.float32(0.1) / np.float32(3))
    log.write(1, {"loss": value})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == value


def test_without_workdir_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(None, [1])
    assert not list(tmp_path.iterdir())


def test_unknown_or_homeless_tracker(tmp_path):
    with pytest.raises(UserError, match="mlflow"):
        Log(tmp_path, track=["mlflow"])
    with pytest.raises(UserError, match="workdir"):
        Log(None, track=["wandb"])


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_absent_tracker_is_one_line(tmp_path, monkeypatch, name, package):
    real = builtins.__import__

    def absent(module, *args, **kwargs):
        if module.split(".")[0] == package:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=f"pip install {package}") as error:
        Log(tmp_path, track=[name])
    assert "\n" not in str(error.value)


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboardX")
    log = Log(tmp_path, track=["tensorboard"])
    log.write(1, {"loss": 2.0})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_wandb_gets_the_rows(tmp_path, monkeypatch):
    sent = []
    run = SimpleNamespace(log=lambda row, step: sent.append((step, row)), finish=lambda: None)
    module = SimpleNamespace(init=lambda **kwargs: run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    log = Log(tmp_path, track=["wandb"])
    log.write(4, {"loss": 2.0})
    log.close()
    assert sent == [(4, {"step": 4, "loss": 2.0})]


def test_real_tokens_leave_padding_out():
    segment = np.asarray([[1, 1, 2, 0], [1, 0, 0, 0]])
    tokens = np.ones((2, 4), int)
    assert real_tokens({"tokens": tokens, "segment": segment}) == 4
    assert real_tokens({"tokens": tokens, "mask": (segment > 0) * 0.5}) == 4
    assert real_tokens({"tokens": tokens}) == 8
    pair = {"tokens": tokens, "mask": segment * 1.0}
    assert real_tokens({"chosen": pair, "rejected": pair}) == 8
    assert real_tokens({"features": np.ones((3, 2))}) == 0


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_is_achieved_over_peak(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    devices = [SimpleNamespace(device_kind="TPU v4")] * 2
    meter = Meter(5.5e9, devices)
    meter.add(30_000)
    meter.add(10_000)
    rates = meter.read()  # 20k tokens/s * 5.5 GFLOP = 110 TFLOP/s of 550
    assert rates["tokens_per_second"] == 20_000
    assert rates["updates_per_second"] == 1.0
    assert rates["mfu"] == pytest.approx(0.2)


def test_no_mfu_on_a_cpu():
    meter = Meter(1e9, [SimpleNamespace(device_kind="cpu")])
    meter.add(10)
    assert "mfu" not in meter.read()


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = Progress(4, start=1)
    bar.update(4, {"loss": 0.25})
    bar.close()
    assert "4/4" in capsys.readouterr().err


def test_progress_can_be_silent(capsys):
    Progress(1, show=False).update(1, {"loss": 0.0})
    assert capsys.readouterr().err == ""
