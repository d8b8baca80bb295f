"""Side-by-side benchmarks: ours against what people use today, in one run, honestly.

``python -m benchmarks`` lists them, ``python -m benchmarks B2 --threads 1 --blocks 5`` runs one;
the last line printed is JSON: both figures, the ratio, its spread, versions, threads and machine.

Rules, kept by ``harness.py``: every contender is a process of its own, pinned to the same cores
with the same number of threads, and they are woken in turn (A B C A B C ...), so that a busy
machine is busy for all. The first updates (compilation, warm-up) are dropped. A ratio is the median
of the ratios block by block, with the smallest and largest beside it, in CPU seconds and in wall
seconds. Both sides start from the same weights (exported from ours, loaded by the peer) and read
the same token ids; their losses before the first update must agree, else no ratio is printed.

To write one: a file ``b<number>.py`` whose docstring's first line is its line in the list, with
``run(settings) -> dict``:

    from benchmarks.harness import Settings, Side, alternate
    from benchmarks.report import report

    def ours(turn, rows):                       # runs in its own process
        work = prepare(rows)                    # not timed
        turn.serve(lambda steps: work(steps), loss0=0.69)

    def peer(turn, rows):
        import torch                            # peers are imported here, never above
        ...

    def run(settings: Settings) -> dict:
        rows = settings.size(256, quick=64, tiny=4)
        sides = [Side("torch", "benchmarks.b99:peer", {"rows": rows}, needs=("torch",)),
                 Side("torch tuned", "benchmarks.b99:peer", {"rows": rows}, needs=("torch",),
                      tuned=True),
                 Side("ours", "benchmarks.b99:ours", {"rows": rows})]
        results = alternate(sides, settings, steps=4)
        return report("B99", results, settings, unit="rows", agree={"loss0": 1e-3})

``serve`` answers one turn after another: the block function runs that many steps and may return
``{"units": ...}`` (what it processed; else steps count) and other numbers. Where the loop is not
ours to call (a trainer's callback), use ``turn.ready``, ``turn.wait`` and ``turn.done`` instead.
``fresh(sides, settings)`` starts a new process for every block, for start-up time and memory: the
side calls ``turn.ready(seconds=..., bytes=...)`` once and returns.
"""
