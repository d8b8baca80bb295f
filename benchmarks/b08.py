"""A ladder of 64 weak-to-strong probes as one program, against the same runs in a torch loop.

A weak linear probe sees 16 of 64 features and labels the transfer half; a strong probe (two hidden
layers) learns from those labels under the reference repository's confidence loss; 16 seeds of the
data times 4 strengths of the loss. All sides start from the same weights, read the same rows in
the same order and must end at the same accuracy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks.harness import Settings, Side, alternate
from benchmarks.report import report, several
from benchmarks.turn import Turn

FEATURES, SEEN, HALF, BATCH = 64, 16, 512, 32
CHECKED = 4  # runs whose accuracy every side has to reproduce
ALPHAS = (0.0, 0.25, 0.5, 0.75)
WEAK_LR, STRONG_LR = 1e-2, 1e-3
REPOSITORY = "torch, the repository's loop"


def run(settings: Settings) -> dict[str, Any]:
    """Hidden 16 and 128; the torch sides train fewer runs a block, all are counted in runs/s."""
    found = {}
    for hidden in settings.size((16, 128), tiny=(16,)):
        size = {"hidden": hidden, "steps": settings.size(200, tiny=5)}
        few = size | {"runs": settings.size(4, tiny=1)}
        many = size | {"runs": settings.size(64, tiny=4)}
        here, few_ours = "benchmarks.b08:", settings.size(16, tiny=2)
        threads = {"threads": settings.threads}
        sides = [
            Side("torch", f"{here}torch_loop", few | threads, ("torch",)),
            Side(REPOSITORY, f"{here}torch_repository", few | threads, ("torch",)),
            Side("one by one", f"{here}ours_serial", size | {"runs": few_ours}),
            Side("ours", f"{here}ours", many),
        ]
        # what a block processes differs from side to side; one turn is one pass over its runs
        sides = [replace(side, units=float(side.options["runs"])) for side in sides]
        results = alternate(sides, settings, steps=1)
        agree = {"accuracy": 2e-3}
        found[f"hidden {hidden}"] = report("B8", results, settings, unit="runs", agree=agree)
    return several(found)


def ours(turn: Turn, hidden: int, steps: int, runs: int) -> None:
    """Two calls of ``population``: the weak probes, then the strong ones."""
    study = Study(hidden, steps)
    cases = grid(runs)
    accuracy = study(grid(CHECKED))
    study(cases)  # another number of runs is another program

    def block(count: int) -> None:
        for _ in range(count):
            study(cases)

    turn.serve(block, accuracy=accuracy)


def ours_serial(turn: Turn, hidden: int, steps: int, runs: int) -> None:
    """The same program for one run at a time."""
    study = Study(hidden, steps)
    cases = grid(runs)
    accuracy = float(np.mean([study([case]) for case in grid(CHECKED)]))

    def block(count: int) -> None:
        for case in cases * count:
            study([case])

    turn.serve(block, accuracy=accuracy)


def grid(runs: int) -> list[tuple[int, float]]:
    """(seed, alpha) of every run."""
    return [(i // len(ALPHAS), ALPHAS[i % len(ALPHAS)]) for i in range(runs)]


@cache
def world(seed: int) -> dict[str, np.ndarray]:
    """Two halves of a noisy linear problem: the weak probe's, and the transfer half."""
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal(FEATURES)
    x = rng.standard_normal((2 * HALF, FEATURES)).astype(np.float32)
    y = (x @ direction + 0.5 * rng.standard_normal(2 * HALF) > 0).astype(np.int64)
    return {"x": x[:HALF], "y": y[:HALF], "more": x[HALF:]}


@cache
def weights(seed: int, hidden: int) -> list[np.ndarray]:
    """Kernels [in, out] of the strong probe: He-normal, the last one small."""
    rng = np.random.default_rng([seed, hidden])
    sizes = (FEATURES, hidden, hidden, 2)
    scale = [(2 / a) ** 0.5 for a in sizes[:2]] + [0.01]
    pairs = zip(sizes[:-1], sizes[1:], scale, strict=True)
    return [(rng.standard_normal((a, b)) * s).astype(np.float32) for a, b, s in pairs]


class Study:
    """The ladder on our side; compiled programs live on between calls."""

    def __init__(self, hidden: int, steps: int) -> None:
        from functools import partial

        from w2s_jax.losses.classification import logconf, soft_xent
        from w2s_jax.models.heads import linear, mlp
        from w2s_jax.objectives import classify
        from w2s_jax.train.optim import Tune

        weak, self.strong = linear(2, SEEN, bias=True), mlp(2, FEATURES, hidden, layers=2)
        self.weak, self.hidden = weak, hidden
        self.teach = classify(weak, soft_xent)
        strong = self.strong
        self.learn = lambda row: classify(strong, partial(logconf, alpha=row["alpha"]))
        tune = Tune(batch=BATCH, steps=steps, optimizer="adam", clip=0.0)
        self.tunes = replace(tune, lr=WEAK_LR), replace(tune, lr=STRONG_LR)

    def __call__(self, cases: list[tuple[int, float]]) -> float:
        """Mean accuracy of the strong probes on the weak half."""
        import jax

        from w2s_jax.train.population import population
        from w2s_jax.types import Table

        seeds = list(dict.fromkeys(seed for seed, _ in cases))
        data = {seed: world(seed) for seed in seeds}
        eye = np.eye(2, dtype=np.float32)
        tables = [
            Table({"features": d["x"][:, :SEEN], "label": eye[d["y"]]}) for d in data.values()
        ]
        zero = self.weak.init(jax.random.key(0))
        weak = population(self.teach, zero, tables, self.tunes[0], seeds)
        labels = {}
        for i, seed in enumerate(seeds):
            params = weak.run(i)[0]
            logits = data[seed]["more"][:, :SEEN] @ params["kernel"] + params["bias"]
            odds = np.exp(logits - logits.max(1, keepdims=True))
            labels[seed] = odds / odds.sum(1, keepdims=True)
        taught = {s: Table({"features": data[s]["more"], "label": labels[s]}) for s in seeds}
        each = [self._params(seed) for seed, _ in cases]
        done = population(
            self.learn,
            jax.tree.map(lambda *leaves: np.stack(leaves), *each),
            [taught[seed] for seed, _ in cases],
            self.tunes[1],
            [seed for seed, _ in cases],
            hyper={"alpha": np.array([alpha for _, alpha in cases], np.float32)},
            stacked=True,
        )
        right = [self._accuracy(done.run(i)[0], data[seed]) for i, (seed, _) in enumerate(cases)]
        return float(np.mean(right))

    def _params(self, seed: int) -> dict[str, Any]:
        *body, head = weights(seed, self.hidden)
        layers = [{"kernel": k, "bias": np.zeros(k.shape[1], np.float32)} for k in body]
        return {"body": layers, "head": {"kernel": head}}

    @staticmethod
    def _accuracy(params: Any, data: dict[str, np.ndarray]) -> float:
        x = data["x"]
        for layer in params["body"]:
            x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        return float(((x @ params["head"]["kernel"]).argmax(1) == data["y"]).mean())


def torch_loop(turn: Turn, hidden: int, steps: int, runs: int, threads: int) -> None:
    """A plain loop: rows of a tensor by index, nothing else."""
    _serve(turn, hidden, steps, runs, threads, per_example=False)


def torch_repository(turn: Turn, hidden: int, steps: int, runs: int, threads: int) -> None:
    """The loop of openai/weak-to-strong's training: examples are dicts, a batch is stacked from
    them, the loss and the accuracy of every step go to lists, a scheduler steps along."""
    _serve(turn, hidden, steps, runs, threads, per_example=True)


def _serve(turn: Turn, hidden: int, steps: int, runs: int, threads: int, per_example: bool) -> None:
    import torch

    torch.set_num_threads(threads)
    cases = grid(runs)
    orders = {seed: _orders(seed, steps) for seed, _ in cases + grid(CHECKED)}

    def one(seed: int, alpha: float) -> float:
        return _torch_run(seed, alpha, hidden, orders[seed], per_example)

    def block(count: int) -> None:
        for seed, alpha in cases * count:
            one(seed, alpha)

    turn.serve(block, accuracy=float(np.mean([one(*case) for case in grid(CHECKED)])))


def _orders(seed: int, steps: int) -> list[np.ndarray]:
    """The rows of every update, as ours draws them."""
    from w2s_jax.train.fit import order

    return [order((0, seed), HALF, BATCH, i) for i in range(steps)]


def _torch_run(
    seed: int, alpha: float, hidden: int, order: list[np.ndarray], per_example: bool
) -> float:
    import torch
    from torch import nn

    data = {name: torch.from_numpy(value) for name, value in world(seed).items()}
    weak = nn.Linear(SEEN, 2)
    nn.init.zeros_(weak.weight)
    nn.init.zeros_(weak.bias)
    labels = nn.functional.one_hot(data["y"], 2).float()
    _torch_train(weak, data["x"][:, :SEEN], labels, WEAK_LR, 0.0, order, per_example)
    with torch.no_grad():
        soft = weak(data["more"][:, :SEEN]).softmax(-1)
    first, second, last = (torch.from_numpy(kernel.T.copy()) for kernel in weights(seed, hidden))
    strong = nn.Sequential(
        nn.Linear(FEATURES, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 2, bias=False),
    )
    with torch.no_grad():
        kernels = (first, second, last)
        for layer, kernel in zip(strong[::2], kernels, strict=True):
            layer.weight.copy_(kernel)
            if layer.bias is not None:
                layer.bias.zero_()
    _torch_train(strong, data["more"], soft, STRONG_LR, alpha, order, per_example)
    with torch.no_grad():
        return float((strong(data["x"]).argmax(-1) == data["y"]).float().mean())


def _torch_train(model, x, labels, lr: float, alpha: float, order, per_example: bool) -> None:
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr)
    examples = []
    if per_example:
        pairs = zip(x, labels, strict=True)
        examples = [{"x": row, "soft_label": label.tolist()} for row, label in pairs]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    losses, accuracies = [], []
    for index in order:
        if per_example:
            batch = [examples[i] for i in index]
            inputs = torch.stack([row["x"] for row in batch])
            targets = torch.tensor([row["soft_label"] for row in batch])
        else:
            rows = torch.from_numpy(index)
            inputs, targets = x[rows], labels[rows]
        logits = model(inputs)
        loss = _confidence(logits, targets, alpha)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if per_example:
            schedule.step()
            losses.append(loss.item())
            accuracies.append((logits.argmax(-1) == targets.argmax(-1)).float().mean().item())


def _confidence(logits, labels, alpha: float):
    """The repository's confidence loss; plain cross-entropy where alpha is 0."""
    import torch

    logps = logits.log_softmax(-1)
    if alpha:
        first = logps.detach()[:, 0].exp()
        cut = torch.quantile(first, labels.mean(0)[1])
        own = torch.stack([first >= cut, first < cut], 1).float()
        labels = (1 - alpha) * labels + alpha * own
    return -(labels * logps).sum(-1).mean()
