"""Which calls are replayed; the graphs themselves need a GPU."""

import logging

import pytest

from cometrt.cuda import graphs


@pytest.fixture
def captured(monkeypatch):
    """Names of calls that were captured, in order."""
    found = []

    def capture(launch):
        found.append(launch())
        return f"graph of {found[-1]}"

    monkeypatch.setattr(graphs, "_capture", capture)
    return found


def test_a_call_is_captured_when_it_comes_again(captured):
    calls = graphs.CallGraphs()
    assert calls.find("a", lambda: "a") is None
    assert calls.find("b", lambda: "b") is None
    assert captured == []
    assert [calls.find("a", lambda: "a") for _ in range(3)] == ["graph of a"] * 3
    assert captured == ["a"]


def test_those_that_were_not_used_for_long_are_forgotten(captured):
    calls = graphs.CallGraphs()
    for _ in range(2):
        calls.find("often", lambda: "often")
    for number in range(2 * graphs.MAX_GRAPHS):
        assert calls.find(number, lambda: "new") is None
        assert calls.find("often", lambda: "often") == "graph of often"
    assert calls.find(0, lambda: "new") is None
    assert captured == ["often"]


def test_what_cannot_be_captured_is_launched(monkeypatch, caplog):
    def fail(launch):
        raise MemoryError("no room")

    monkeypatch.setattr(graphs, "_capture", fail)
    calls = graphs.CallGraphs()
    with caplog.at_level(logging.WARNING, logger="cometrt"):
        assert [calls.find("a", lambda: None) for _ in range(4)] == [None] * 4
    assert caplog.text.count("no room") == 1


def test_calls_that_are_watched_are_launched(captured):
    calls = graphs.CallGraphs()
    calls.enabled = False
    assert [calls.find("a", lambda: "a") for _ in range(3)] == [None] * 3
    assert captured == []
