"""Parameters and optimizer state: where they lie, and how they are saved and loaded.

A file has the experts of the whole model, so another number of ranks, or another TP, can load it.
On the devices, experts lie rank by rank along an axis that is sharded over the ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import save_file

import cometrt
from lm.model import ModelConfig, random_parameters


class States:
    """Makes, saves and loads the state {"parameters", "optimizer"} of a mesh.

    Args:
        optimizer: of optax.
        path: of the checkpoint, which all processes can read.
    """

    def __init__(
        self, mesh: Any, spec: cometrt.MoESpec, config: ModelConfig, optimizer: Any, path: Path
    ) -> None:
        self._mesh, self._spec, self._config = mesh, spec, config
        self._optimizer, self._path = optimizer, path
        self._ranks = mesh.shape["expert"]

    def specs(self, tree: Any) -> Any:
        """The PartitionSpec of each array: of experts, and of all others, which are replicated."""

        def of(path: Any, _: Any) -> P:
            sharded = any(getattr(key, "key", None) == "experts" for key in path)
            return P(None, "expert") if sharded else P()

        return jax.tree_util.tree_map_with_path(of, tree)

    def shardings(self, tree: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(self._mesh, spec), self.specs(tree))

    def start(self, seed: int) -> dict[str, Any]:
        """A state with random parameters, the same for any mesh."""
        parameters = self._place(random_parameters(self._config, seed))
        shardings = self.shardings(jax.eval_shape(self._optimizer.init, parameters))
        optimizer = jax.jit(self._optimizer.init, out_shardings=shardings)(parameters)
        return {"parameters": parameters, "optimizer": optimizer}

    def save(self, state: dict[str, Any], losses: list[float]) -> None:
        """Collective: write the state, and the losses of all steps so far, by process 0."""

        def fetch(array: Any) -> np.ndarray:
            if array.is_fully_addressable or array.is_fully_replicated:
                return np.asarray(array)
            return np.asarray(multihost_utils.process_allgather(array, tiled=True))

        fetched = jax.tree.map(fetch, state)
        if jax.process_index() != 0:
            return
        named, _ = jax.tree_util.tree_flatten_with_path(_on_experts(self._whole, fetched))
        tensors = {jax.tree_util.keystr(path): np.asarray(leaf, order="C") for path, leaf in named}
        tensors["losses"] = np.array(losses, np.float64)
        partial = self._path.with_suffix(".partial")
        metadata = {"config": json.dumps(vars(self._config)), "step": str(len(losses))}
        save_file(tensors, partial, metadata)
        os.replace(partial, self._path)  # a process that ends half-way leaves the old file

    def load(self) -> tuple[dict[str, Any], list[float]]:
        """The saved state on this mesh, and its losses.

        Raises:
            ValueError: if the file is of another model.
        """
        with safe_open(self._path, "numpy") as file:
            saved = json.loads(file.metadata()["config"])
            if saved != vars(self._config):
                raise ValueError(f"{self._path} must be of {self._config} (got {saved})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parameters = jax.eval_shape(lambda: random_parameters(self._config, 0))
        optimizer = jax.eval_shape(self._optimizer.init, parameters)
        names, tree = jax.tree_util.tree_flatten_with_path(
            {"parameters": parameters, "optimizer": optimizer}
        )
        leaves = [tensors[jax.tree_util.keystr(path)] for path, _ in names]
        return self._place(jax.tree.unflatten(tree, leaves)), tensors["losses"].tolist()

    def _place(self, whole: Any) -> Any:
        """The arrays of a whole model on the mesh."""
        stacked = _on_experts(self._stacked, whole)
        return jax.tree.map(
            lambda array, sharding: jax.make_array_from_callback(
                array.shape, sharding, lambda index: array[index]
            ),
            stacked,
            self.shardings(stacked),
        )

    def _stacked(self, whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The experts of the model [L, E, ...] as those of each rank [L, W * E_l, ...]."""
        layers = [
            [
                cometrt.shard_weights(w_up, w_down, rank, self._ranks, self._spec)
                for rank in range(self._ranks)
            ]
            for w_up, w_down in zip(whole["w_up"], whole["w_down"], strict=True)
        ]
        w_up, w_down = (
            np.stack([np.concatenate([shards[part] for shards in layer]) for layer in layers])
            for part in range(2)
        )
        return {"w_up": w_up, "w_down": w_down}

    def _whole(self, stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inverse of `_stacked`."""
        layers = [
            cometrt.unshard_weights(
                list(zip(*(np.split(part, self._ranks) for part in layer), strict=True)), self._spec
            )
            for layer in zip(stacked["w_up"], stacked["w_down"], strict=True)
        ]
        w_up, w_down = map(np.stack, zip(*layers, strict=True))
        return {"w_up": w_up, "w_down": w_down}


def _on_experts(function: Callable[[dict], dict], tree: Any) -> Any:
    """The tree with function(experts) in place of each {"w_up", "w_down"}: of the parameters, and
    of the optimizer's moments."""

    def is_experts(node: Any) -> bool:
        return isinstance(node, dict) and node.keys() == {"w_up", "w_down"}

    return jax.tree.map(
        lambda node: function(node) if is_experts(node) else node, tree, is_leaf=is_experts
    )
