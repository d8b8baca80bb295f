"""Strict numerics for every test, eight simulated devices, the one door to optional real data."""

import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

# the suite is mostly compilation, which costs a fifth without the compiler's optimisations
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run when named one by one, or with ``CI_SHARE`` in the environment: "all", or
    0 or 1 for that half of them."""
    share = os.environ.get("CI_SHARE", "none")
    if share == "all" or any("::" in word for word in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    dropped = [i for i in slow if str(zlib.crc32(i.nodeid.encode()) % 2) != share]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget compiled programs before the kernel refuses more: each one takes a few memory maps, a
    process may hold 65,530 (Linux, vm.max_map_count), and past that XLA dies without a word."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it skip without it."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("real data folder is absent")
    return root
