"""`Placement`: on which devices, and in which order, a program may run a world's ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a world's ranks are.

    Attributes:
        mesh: of `connect`, or None.
        processes: JAX's index of each rank's process, in rank order; with a mesh, empty.
    """

    mesh: Any
    processes: tuple[int, ...]

    def check(self, context: Any) -> None:
        """Check the devices of a program. While it is traced only their number is known: a rank
        would silently get the tokens and experts of another one if the order differed.

        Args:
            context: `axis_context` of JAX's lowering. What it does not tell is not checked.

        Raises:
            ValueError: unless the devices are those of the ranks, in their order.
        """
        num_devices = getattr(context, "num_devices", 1)
        if num_devices > 1:
            raise ValueError(
                f"moe must be called inside jax.shard_map in a program on several devices (this "
                f"one runs on {num_devices}): map it, or put its arrays on one device"
            )
        mesh = getattr(context, "mesh", None)
        if mesh is None:
            return
        if not isinstance(mesh, jax.sharding.Mesh):
            if mesh.size > 1:
                raise ValueError(
                    "mesh of jax.shard_map must be a jax.sharding.Mesh, or be set by jax.set_mesh: "
                    "the order of its devices must be known (got an AbstractMesh)"
                )
        elif self.mesh is not None:
            self._check_mesh(mesh)
        elif mesh.size > 1:
            self._check_processes(mesh, getattr(context, "manual_axes", mesh.axis_names))

    def _check_mesh(self, mesh: Any) -> None:
        names = [name for name, size in self.mesh.shape.items() if size > 1]
        found, expected = _devices(mesh, names), _devices(self.mesh, names)
        if found != expected:
            raise ValueError(
                f"mesh of jax.shard_map must have the devices of the world's mesh in the same "
                f"order, {_text(expected)} (got {_text(found)})"
            )

    def _check_processes(self, mesh: Any, mapped: Any) -> None:
        found = [device.process_index for device in mesh.devices.flat]
        if len(set(found)) < len(found):
            raise ValueError(
                "world must come from connect(mesh) to be used in a shard_map over several "
                f"devices of a process (got a mesh of {dict(mesh.shape)})"
            )
        if any(size > 1 and name not in mapped for name, size in mesh.shape.items()):
            raise ValueError(
                f"moe must be called inside jax.shard_map over all axes of its mesh "
                f"{dict(mesh.shape)} (mapped here: {', '.join(sorted(mapped))})"
            )
        ranks = [process for process in found if process in self.processes]
        if ranks != list(self.processes):
            raise ValueError(
                "mesh of jax.shard_map must have the processes of the world's ranks in their "
                f"order, {_text(self.processes)} (got {_text(found)})"
            )


def _devices(mesh: Any, names: list[str]) -> list[Any]:
    """All devices of a mesh, in the order of those axes, and of the others after them."""
    first = [mesh.axis_names.index(name) for name in names]
    others = [axis for axis in range(mesh.devices.ndim) if axis not in first]
    return list(mesh.devices.transpose(*first, *others).flat)


def _text(values: Any) -> str:
    return ", ".join(map(str, values))
