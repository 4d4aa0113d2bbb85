"""Mixture-of-Experts layers that overlap the token exchange with the expert GEMMs.

    world = cometrt.connect(MPI.COMM_WORLD, device="host")
    layer = cometrt.MoELayer(world, cometrt.MoESpec(...))
    y, saved = layer.forward(x, topk_ids, topk_weights, w_up, w_down)
    grads = layer.backward(dy, saved)

Importing this package needs neither MPI, CUDA nor matplotlib.
"""

from cometrt import models, reference, router, trace
from cometrt.errors import CapacityError, CometError, MismatchError, PeerTimeout, RoutingError
from cometrt.layer import MoELayer
from cometrt.memory import Memory
from cometrt.plan import TileConfig
from cometrt.specs import Gradients, MoESpec
from cometrt.stats import LayerStats
from cometrt.weights import shard_weights, unshard_weights
from cometrt.world import World, connect, spawn

__version__ = "0.2.0"

__all__ = [
    "CapacityError",
    "CometError",
    "Gradients",
    "LayerStats",
    "Memory",
    "MismatchError",
    "MoELayer",
    "MoESpec",
    "PeerTimeout",
    "RoutingError",
    "TileConfig",
    "World",
    "__version__",
    "connect",
    "models",
    "reference",
    "router",
    "shard_weights",
    "spawn",
    "trace",
    "unshard_weights",
]
