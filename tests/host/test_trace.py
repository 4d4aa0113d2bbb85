"""The recording of both roles, the numbers drawn from it, and the files."""

import itertools
import json
import math
import sys

import pytest

import cometrt
from cometrt.trace import Event, Timeline
from tests.cases import Case, make_inputs
from tests.host.test_orders import Rank

CASE = Case((4, 1))


@pytest.fixture(scope="module")
def timelines():
    """One timeline a rank of a forward and a backward, and every rank's plan numbers."""
    inputs = make_inputs(CASE)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        with cometrt.trace.record(rank.layer) as recording:
            rank.forward(0)
            rank.backward(0)
        rank.forward(0)  # not recorded
        return recording.gather()

    return cometrt.spawn(fn, CASE.size)


def test_both_roles_of_all_ranks_are_recorded(timelines):
    assert all(timeline.events == timelines[0].events for timeline in timelines)
    timeline = timelines[0]
    assert timeline.ranks == [0, 1, 2, 3]
    names = {(e.role, e.name) for e in timeline.events}
    compute = {"publish", "plan", "up", "down", "down dgrad", "up dgrad", "wgrad"}
    comm = {"pull", "reduce and push", "reduce at home"}
    assert names >= {("compute", n) for n in compute} | {("comm", n) for n in comm}
    assert all(e.begin_ns <= e.end_ns for e in timeline.events)
    for rank in timeline.ranks:
        up = [e.tile for e in timeline.events if (e.rank, e.name) == (rank, "up")]
        assert sorted(up) == list(range(len(up)))
        assert timeline.seconds(rank, "up") > 0


def test_bytes_are_those_of_the_tokens_that_cross(timelines):
    inputs, timeline = make_inputs(CASE), timelines[0]
    row_bytes = CASE.spec.hidden * 2
    experts = CASE.spec.num_experts // 4
    for rank in range(4):
        remote = sum(
            int((ids // experts == rank).any(axis=1).sum())
            for source, ids in enumerate(inputs.ids)
            if source != rank
        )
        # x once in forward and dy once in backward; y and dx partials likewise.
        assert timeline.link_bytes(rank, "pull") == 2 * remote * row_bytes
        assert timeline.link_bytes(rank, "reduce and push") == 2 * remote * row_bytes
    assert 0 <= timeline.hidden_share <= 1


def event(role, name, begin, end, rank=0, link_bytes=0):
    return Event(rank, role, name, begin, end, link_bytes=link_bytes)


def test_hidden_share_counts_communication_under_compute_of_the_same_rank():
    timeline = Timeline(
        [
            event("comm", "pull", 0, 100, link_bytes=8),
            event("comm", "pull", 100, 120),  # local rows are not communication
            event("comm", "wait", 100, 500),  # waiting is not communication
            event("comm", "reduce and push", 500, 600, link_bytes=8),
            event("compute", "plan", 0, 20),  # planning hides nothing
            event("compute", "wait", 20, 40),
            event("compute", "up", 40, 90),
            event("compute", "down", 80, 520),  # overlapping spans count once
            event("compute", "up", 0, 1000, rank=1),  # another rank's compute hides nothing
        ]
    )
    assert timeline.hidden_share == pytest.approx((60 + 20) / 200)
    assert timeline.span_sec == pytest.approx(1e-6)


def test_an_empty_timeline(tmp_path):
    timeline = Timeline([])
    assert math.isnan(timeline.hidden_share)
    assert timeline.span_sec == 0
    timeline.save_json(tmp_path / "empty.json")
    assert json.loads((tmp_path / "empty.json").read_text())["traceEvents"] == []
    pytest.importorskip("matplotlib")
    timeline.save_png(tmp_path / "empty.png")


def test_chrome_trace(timelines, tmp_path):
    timelines[0].save_json(tmp_path / "t.json")
    records = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [r for r in records if r["ph"] == "X"]
    assert len(spans) == len(timelines[0].events)
    assert min(r["ts"] for r in spans) == 0
    assert all(r["dur"] >= 0 and r["pid"] in range(4) and r["tid"] in (0, 1) for r in spans)
    named = {(r["pid"], r["tid"]): r["args"]["name"] for r in records if r["ph"] == "M"}
    assert named[2, 1] == "compute"
    # Perfetto nests spans of one track: none may begin inside another and end after it.
    for track in {(r["pid"], r["tid"]) for r in spans}:
        lane = sorted((r["ts"], r["ts"] + r["dur"]) for r in spans if (r["pid"], r["tid"]) == track)
        for (_, end), (begin, _) in itertools.pairwise(lane):
            assert begin >= end - 1e-3


def test_png(timelines, tmp_path):
    pytest.importorskip("matplotlib")
    timelines[0].save_png(tmp_path / "t.png", "title")
    data = (tmp_path / "t.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 10_000


def test_png_without_matplotlib_says_what_to_install(timelines, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'cometrt\[plot\]'"):
        timelines[0].save_png(tmp_path / "t.png")
