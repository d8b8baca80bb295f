"""Strict numerics for every test, eight simulated devices, the one door to optional real data."""

import os
import zlib
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``CI_SHARE=0..3`` in the environment, that quarter of the slow tests; else all."""
    share = os.environ.get("CI_SHARE", "all")
    if share == "all":
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    dropped = [item for item in slow if zlib.crc32(item.nodeid.encode()) % 4 != int(share)]
    items[:] = [item for item in items if item not in dropped]
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that need it skip without it."""
    root = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip("real data folder is absent")
    return root
