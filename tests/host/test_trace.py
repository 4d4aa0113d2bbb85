"""The recording of both roles, the numbers drawn from it, and the files."""

import itertools
import json
import math
import sys
import time
import types

import numpy as np
import pytest

import cometrt
from cometrt.cuda import launch_trace, trace
from cometrt.cuda.launch_trace import LAUNCHES, events_of_launches
from cometrt.cuda.trace import events_of
from cometrt.host import comm
from cometrt.kernels.constants import TRACE_LANES
from cometrt.kernels.params import (
    ParamStruct,
    exchange_params_dtype,
    exchange_state_dtype,
    trace_lane_dtype,
)
from cometrt.trace import Comparison, Event, Timeline, picture
from cometrt.trace.events import difference, length, overlap, union
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


def event(role, name, begin, end, rank=0, **more):
    return Event(rank, role, name, begin, end, **more)


def of_ctas():
    """Two CTAs of one rank: each has a load thread, a thread that multiplies, and comm warps."""
    return [
        event("compute", "wait", 0, 40, flag="tile_filled", cta=0, lane=0),
        event("compute", "up", 40, 100, tile=1, column=0, cta=0, lane=4),
        event("compute", "wait", 60, 120, flag="tile_filled", cta=0, lane=0),
        event("compute", "up", 120, 200, tile=1, column=1, cta=0, lane=4),
        event("compute", "up", 0, 200, tile=0, column=0, cta=1, lane=4),
        event("comm", "pull", 0, 100, link_bytes=64, cta=0, lane=2),
        event("comm", "wait", 100, 150, flag="link", cta=0, lane=2),
        event("comm", "pull", 0, 50, local_bytes=64, cta=0, lane=3),
    ]


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


def test_hidden_share_of_ctas_is_that_of_those_that_work():
    assert Timeline(of_ctas()).hidden_share == pytest.approx((60 / 100 + 1) / 2)


def test_waits_are_shares_of_the_time_of_all_who_might_have_worked():
    waits = Timeline(of_ctas()).waits()
    # Of the second wait, 40 ns lie under the CTA's own work.
    assert waits[0, "compute"] == pytest.approx({"work": 340 / 400, "tile_filled": 60 / 400})
    assert waits[0, "comm"] == pytest.approx({"work": 150 / 400, "link": 50 / 400})
    head, compute = (str(waits).splitlines()[i] for i in (0, 2))
    assert head.split() == "rank role working tile_filled link the rest".split()
    assert compute.split() == "0 compute 85.0% 15.0% 0.0% 0.0%".split()


def test_waits_of_a_layer_name_their_flags(monkeypatch):
    inputs, pull = make_inputs(CASE), comm.pull_rows

    def late(*args):
        time.sleep(0.1)  # compute has nothing but to wait
        pull(*args)

    def fn(world):
        rank = Rank(world, CASE, [inputs])
        with cometrt.trace.record(rank.layer) as recording:
            if world.rank == 3:
                time.sleep(0.1)
            rank.forward(0)
        return recording.gather()

    monkeypatch.setattr(comm, "pull_rows", late)
    timeline = cometrt.spawn(fn, CASE.size)[0]
    flags = {e.flag for e in timeline.events if e.name == "wait"}
    assert {"source_ready", "tile_filled"} <= flags
    assert flags <= {"source_ready", "tile_filled", "tile_done", "partials_ready"}
    assert not any(e.flag for e in timeline.events if e.name != "wait")
    waits = timeline.waits()
    assert len(waits) == 2 * CASE.size
    assert all(0 < sum(shares.values()) <= 1 for shares in waits.values())


def lanes_of(counts, records):
    lanes = np.zeros((2, TRACE_LANES), trace_lane_dtype)
    for (cta, lane), count in counts.items():
        lanes["num_events"][cta, lane] = count
    for (cta, lane, index), values in records.items():
        lanes["events"][cta, lane, index] = values
    return lanes


def test_what_kernels_have_recorded_becomes_events():
    lanes = lanes_of(
        {(0, 4): 1, (1, 2): 2},
        {
            (0, 4, 0): (5, 9, 0, 0, 3, 1, 0),
            (1, 2, 0): (1, 2, 64, 32, -1, -1, 5),
            (1, 2, 1): (2, 4, 0, 0, -1, -1, 11),
        },
    )
    assert events_of(lanes, 7) == [
        event("compute", "up", 5, 9, rank=7, tile=3, column=1, cta=0, lane=4),
        event("comm", "pull", 1, 2, rank=7, local_bytes=64, link_bytes=32, cta=1, lane=2),
        event("comm", "wait", 2, 4, rank=7, flag="link", cta=1, lane=2),
    ]


def test_the_clock_of_a_gpu_is_compared_with_that_of_the_host(monkeypatch):
    behind, waits = 5_000_000_000, itertools.chain([0.02, 0.0], itertools.repeat(0.001))
    stream = types.SimpleNamespace(ptr=3, synchronize=lambda: time.sleep(next(waits)))
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def read_clock(stream, grid, address):
        assert (stream, grid, int(address)) == (3, 1, memory.ctypes.data)
        memory[0] = time.monotonic_ns() - behind

    memory = np.zeros(1, np.uint64)
    monkeypatch.setattr(trace, "pinned", lambda dtype: memory)
    monkeypatch.setattr(trace, "load_kernels", lambda *names: (read_clock,))
    assert abs(trace.Clock().offset_ns() - behind) < 2_000_000
    lanes = lanes_of({(0, 4): 1}, {(0, 4, 0): (5, 9, 0, 0, 3, 1, 0)})
    (found,) = events_of(lanes, 0, 100)
    assert (found.begin_ns, found.end_ns) == (105, 109)


def test_events_without_room_are_counted():
    room = trace_lane_dtype["events"].shape[0]
    with pytest.warns(UserWarning, match=r"3 events of rank 0 did not fit"):
        events = events_of(lanes_of({(0, 4): room + 3}, {}), 0)
    assert len(events) == room


def test_files_of_ctas(tmp_path):
    timeline = Timeline(of_ctas())
    timeline.save_json(tmp_path / "t.json")
    records = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    tracks = {r["tid"]: r["args"]["name"] for r in records if r["name"] == "thread_name"}
    assert sorted(tracks.values()) == [
        "CTA 0 comm 2", "CTA 0 comm 3", "CTA 0 compute 0", "CTA 0 compute 4", "CTA 1 compute 4",
    ]  # fmt: skip
    assert {tracks[r["tid"]] for r in records if r["name"] == "wait for link"} == {"CTA 0 comm 2"}
    pytest.importorskip("matplotlib")
    for rank in (None, 0):
        timeline.save_png(tmp_path / "t.png", rank=rank)
        assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_timeline(tmp_path):
    timeline = Timeline([])
    assert math.isnan(timeline.hidden_share)
    assert timeline.span_sec == 0
    assert timeline.waits() == {}
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
    named = {(r["pid"], r["tid"]): r["args"]["name"] for r in records if r["name"] == "thread_name"}
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


# ---- passes, and the picture ---------------------------------------------------------------------


def test_a_forward_and_a_backward_are_two_passes(timelines):
    forward, backward = timelines[0].passes
    assert (forward.name, backward.name) == ("forward", "backward")
    assert len(forward.events) + len(backward.events) == len(timelines[0].events)
    assert {"up", "down", "reduce at home"} <= {e.name for e in forward.events}
    assert not {e.name for e in forward.events} & {"down dgrad", "up dgrad", "wgrad"}
    assert not {e.name for e in backward.events} & {"up", "down", "plan"}
    for rank in timelines[0].ranks:
        row_bytes = [sum(e.link_bytes for e in p.of_rank(rank)) for p in (forward, backward)]
        assert row_bytes[0] == row_bytes[1]  # dy and dx are as large as x and y


def test_passes_of_the_same_direction_are_told_apart():
    calls = [("up", 0), ("down", 10), ("up", 30), ("down", 40), ("down dgrad", 60), ("wgrad", 70),
             ("down dgrad", 90), ("up", 120)]  # fmt: skip
    events = [event("compute", name, begin, begin + 9) for name, begin in calls]
    events += [
        event("comm", "reduce at home", 20, 22),
        event("comm", "pull", 23, 28),
        event("comm", "wait", 50, 52, flag="partials_ready"),
        event("compute", "wait", 53, 58, flag="source_ready"),
    ]
    passes = Timeline(events).passes
    assert [one.name for one in passes] == [
        "forward", "forward", "backward", "backward", "forward",
    ]  # fmt: skip
    assert [(one.begin_ns, one.end_ns) for one in passes] == [
        (0, 22), (23, 52), (53, 79), (90, 99), (120, 129),
    ]  # fmt: skip


def test_gemms_of_two_ctas_that_overlap_are_one_pass():
    events = [
        event("compute", "up", 0, 10, cta=0, lane=4),
        event("compute", "down", 10, 20, cta=0, lane=4),
        event("compute", "up", 5, 15, cta=1, lane=4),
        event("compute", "up", 15, 18, cta=1, lane=4),
    ]
    (one,) = Timeline(events).passes
    assert len(one.events) == 4


def test_difference_is_what_an_overlap_leaves():
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.sort(rng.integers(0, 60, (2, 8, 2)), axis=-1).tolist()
        left, right = (
            union(event("comm", "pull", begin, end) for begin, end in of if begin < end)
            for of in times
        )
        rest = difference(left, right)
        assert length(rest) == length(left) - overlap(left, right)
        assert overlap(rest, right) == 0


def test_the_title_has_the_hidden_share_and_each_pass_its_own(monkeypatch):
    drawn = []
    monkeypatch.setattr(picture, "save_png", lambda *arguments: drawn.append(arguments))
    timeline = Timeline(
        [
            event("comm", "pull", 0, 1_000_000, link_bytes=8),
            event("compute", "up", 500_000, 2_000_000),
            event("compute", "down dgrad", 3_000_000, 4_000_000),
        ]
    )
    timeline.save_png("t.png", "a layer")
    Timeline([]).save_png("t.png", "nothing")
    (_, (section,), title, rank), (_, (empty,), plain, _) = drawn
    assert title == "a layer: 50% of the communication hidden"
    assert section.notes == ["forward 2.00 ms, 50% hidden", "backward 1.00 ms"]
    assert (len(section.passes), rank, empty.passes, plain) == (2, None, [], "nothing")


def sequential_and_fused():
    """A forward in each mode, on two ranks: 3 ms and 2 ms long, none and half of it hidden."""
    launches, fused = [], []
    for rank in range(2):
        launches += [
            event("compute", "publish", 0, 200_000, rank=rank),
            event("comm", "pull", 200_000, 1_200_000, rank=rank, link_bytes=8),
            event("compute", "up", 1_200_000, 3_000_000, rank=rank),
        ]
        fused += [
            event("compute", "publish", 1_000_000, 1_200_000, rank=rank),
            event("comm", "pull", 1_200_000, 2_200_000, rank=rank, link_bytes=8, cta=0, lane=2),
            event("compute", "up", 1_700_000, 3_000_000, rank=rank, cta=0, lane=4),
        ]
    return {"sequential": Timeline(launches), "fused": Timeline(fused)}


def test_two_modes_are_drawn_on_one_scale_from_their_own_begins(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    made = []

    class Kept(figure.Figure):
        def __init__(self, *args, **more):
            made.append(self)
            super().__init__(*args, **more)

    monkeypatch.setattr(figure, "Figure", Kept)
    for rank in (None, 1):
        Comparison(sequential_and_fused()).save_png(tmp_path / "t.png", "a layer", rank=rank)
        top, bottom, _ = made[-1].axes
        assert top.get_xlim() == bottom.get_xlim() == (0, 3)
        assert top.get_position().y0 > bottom.get_position().y1
        texts = {text.get_text() for text in made[-1].texts}
        assert texts == {
            "a layer: fused hides 50% of the communication",
            "sequential", "3.00 ms", "fused", "2.00 ms",
        }  # fmt: skip
        ends = [
            max(boxes.get_extents().x1 for of in axes.collections for boxes in of.get_paths())
            for axes in (top, bottom)
        ]
        assert ends == pytest.approx([3, 2])


def test_two_modes_have_processes_of_their_own(tmp_path):
    Comparison(sequential_and_fused()).save_json(tmp_path / "t.json")
    records = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    named = {r["args"]["name"]: r["pid"] for r in records if r["name"] == "process_name"}
    assert list(named) == ["sequential rank 0", "sequential rank 1", "fused rank 0", "fused rank 1"]
    assert len(set(named.values())) == 4
    spans = [r for r in records if r["ph"] == "X"]
    for mode in ("sequential", "fused"):
        of_mode = [r for r in spans if r["pid"] in (named[f"{mode} rank {i}"] for i in range(2))]
        assert len(of_mode) == 6
        assert min(r["ts"] for r in of_mode) == 0


def test_launches_beside_ctas_change_no_share():
    fused = sequential_and_fused()["fused"]
    ctas = Timeline([e for e in fused.events if e.cta >= 0])
    assert fused.hidden_share == ctas.hidden_share == 0.5
    assert fused.waits()[0, "compute"] == {"work": pytest.approx(1.3 / 2)}


# ---- launches ------------------------------------------------------------------------------------


def test_launches_of_a_sequential_call_are_events():
    names = ["publish", "agree", "dispatch", "up_dgrad", "push", "home_reduce"]
    records = np.zeros((8, 3), np.uint64)
    records[: len(names)] = [(10 * i, 10 * i + 8, 3 * (i in (2, 4))) for i in range(len(names))]
    events = events_of_launches(names, records, rank=1, row_bytes=128, offset_ns=1000)
    assert [(e.role, e.name, e.flag) for e in events] == [LAUNCHES[name] for name in names]
    assert [(e.begin_ns, e.end_ns) for e in events[:2]] == [(1000, 1008), (1010, 1018)]
    assert [e.link_bytes for e in events] == [0, 0, 384, 0, 384, 0]
    assert {(e.rank, e.cta, e.lane, e.tile) for e in events} == {(1, -1, -1, -1)}


def test_launches_without_room_are_counted():
    with pytest.warns(UserWarning, match="3 launches of rank 0 did not fit"):
        events = events_of_launches(["up"] * 5, np.full((2, 3), 7, np.uint64), 0, 128)
    assert len(events) == 2


def test_a_launch_that_raised_is_no_event():
    records = np.array([(1000, 1008, 0), (1010, 0, 0)], np.uint64)
    (event,) = events_of_launches(["publish", "plan"], records, 0, 128)
    assert event.name == "publish"


class FakeMemory:
    """Stands for CuPy: an array at address 0, streams of which those below 10 do not capture."""

    uint64 = np.uint64

    def __init__(self):
        self.cuda = self.runtime = self
        self.data, self.ptr = self, 0

    def zeros(self, shape, dtype):
        self.shape = shape
        return self

    def get(self):
        return np.zeros(self.shape, self.uint64)

    def streamIsCapturing(self, stream):
        return stream >= 10


def test_launches_are_timed_until_the_recording_ends(monkeypatch):
    """Each gets its own record. What a stream captures is launched alone: its graph may outlive the
    memory of the records."""
    queued = []

    def launch(name):
        return lambda stream, *args: queued.append((name, stream, *args))

    monkeypatch.setitem(sys.modules, "cupy", FakeMemory())
    monkeypatch.setattr(launch_trace, "load_kernels", lambda _, *names: map(launch, names))
    params = ParamStruct(exchange_params_dtype)
    params.fields["send_offsets"], params.fields["state"] = 1000, 2000
    before = {name: launch(name) for name in ("up", "dispatch", "finish")}
    kernels = dict(before)
    trace = launch_trace.LaunchTrace(kernels, num_ranks=4)
    kernels["up"](1, "call")
    kernels["dispatch"](2, params)
    kernels["dispatch"](11, params)
    kernels["finish"](1, params)
    ok = 2000 + exchange_state_dtype.fields["ok"][1]
    assert queued == [
        ("read_clock", 1, 1, 0),
        ("up", 1, "call"),
        ("end_launch", 1, 1, 0, 0, 0),
        ("read_clock", 2, 1, 24),
        ("dispatch", 2, params),
        ("end_launch", 2, 1, 24, ok, 1000 + 4 * 4),
        ("dispatch", 11, params),
        ("finish", 1, params),
    ]
    trace.end()
    assert kernels == before
    assert trace.read()[0] == ["up", "dispatch"]


def test_waits_are_greys_that_can_be_told_apart():
    def rgb(color):
        return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])

    greys = [rgb(color) for color in picture.GROUPS["waits for"].values()]
    assert all(np.ptp(grey) <= 16 for grey in greys)
    light = sorted(grey.mean() for grey in [*greys, rgb("#ffffff")])
    assert min(np.diff(light)) >= 30
    work = [rgb(color) for group in list(picture.GROUPS)[:3] for color in
            picture.GROUPS[group].values()]  # fmt: skip
    assert all(np.ptp(color) >= 60 for color in work)


def test_a_picture_of_many_ctas_is_drawn_at_once(tmp_path, monkeypatch):
    """Boxes drawn one by one took minutes for a real layer's."""
    collections = pytest.importorskip("matplotlib.collections")
    made = []

    class Counted(collections.PolyCollection):
        def __init__(self, *args, **more):
            made.append(self)
            super().__init__(*args, **more)

    monkeypatch.setattr(collections, "PolyCollection", Counted)
    events = [
        event(role, name, 100 * i, 100 * i + 90, rank=rank, cta=cta, lane=lane)
        for rank in range(2)
        for cta in range(132)
        for role, name, lane in (("compute", "up", 4), ("comm", "pull", 2), ("comm", "pull", 3))
        for i in range(10)
    ]
    for rank in (None, 1):
        made.clear()
        Timeline(events).save_png(tmp_path / "t.png", rank=rank)
        assert len(made) == 2  # one a color
