"""Record a timeline of a layer's roles, draw it, and compute how much communication was hidden.

    with cometrt.trace.record(layer) as recording:
        layer.forward(...)
    timeline = recording.gather()               # collective: all ranks' events
    timeline.save_png("timeline.png")           # needs matplotlib
    timeline.save_json("timeline.json")         # opens in Perfetto and chrome://tracing
    print(timeline.hidden_share)
    print(timeline.waits())

On device="cuda" the kernels of mode "fused" record events, one lane of events per CTA and thread:
see kernels_cu/common/trace.cuh. Other launches, such as those of mode "sequential", are one event
each. Two kernels that read the clock stand around each launch meanwhile. Calls of mode "chunked",
and calls in CUDA graphs of the caller, are not recorded.

    both = Comparison({"sequential": timeline, "fused": other})
    both.save_png("modes.png")                  # one above the other, on one scale
"""

from cometrt.trace.comparison import Comparison
from cometrt.trace.events import ROLES, Event
from cometrt.trace.passes import Pass
from cometrt.trace.recording import NullTracer, Recording, Tracer, record
from cometrt.trace.timeline import Timeline
from cometrt.trace.waits import Waits

__all__ = [
    "ROLES",
    "Comparison",
    "Event",
    "NullTracer",
    "Pass",
    "Recording",
    "Timeline",
    "Tracer",
    "Waits",
    "record",
]
