"""What every test needs: which of them run, and Hypothesis without its deadline."""

import gc
import os
import sys

import hypothesis
import pytest

hypothesis.settings.register_profile("cometrt", deadline=None, derandomize=True)
hypothesis.settings.load_profile("cometrt")


# JAX reads it when it starts: four devices on the CPU.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")


def pytest_configure(config):
    if config.getoption("--gpu"):  # before anything starts CUDA; see cometrt.spawn
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_runtest_logreport(report):
    """Where COMETRT_TESTS_TELL_AT_ONCE is set, a failure is printed when it comes: what ends pytest
    before its summary does not hide it."""
    if report.failed and os.environ.get("COMETRT_TESTS_TELL_AT_ONCE"):
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the full product of parameters")
    parser.addoption("--gpu", action="store_true", help="also what needs an NVIDIA GPU")
    parser.addoption("--part", default="1/1", help="2/3: the second third of the tests")


@pytest.hookimpl(trylast=True)  # of what -k and -m have left
def pytest_collection_modifyitems(config, items):
    wanted = {name for name in ("full", "gpu") if config.getoption(f"--{name}")}
    skipped = [i for i in items if {m.name for m in i.iter_markers()} & {"full", "gpu"} - wanted]
    config.hook.pytest_deselected(items=skipped)
    items[:] = [item for item in items if item not in set(skipped)]
    # Neighbours stay in one part: they share inputs and references.
    part, parts = map(int, config.getoption("--part").split("/"))
    begin, end = (len(items) * index // parts for index in (part - 1, part))
    config.hook.pytest_deselected(items=items[:begin] + items[end:])
    items[:] = items[begin:end]


def pytest_collection_finish(session):
    """`cometrt.spawn` collects garbage each time: not among modules and collected tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_thread_left_behind():
    """Every call joins the threads it started, also when it fails."""
    import threading

    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith("cometrt-")]
    assert not left, left
