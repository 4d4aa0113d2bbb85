"""Forwards with plans made ahead, on any device: against forwards that plan for themselves."""

from __future__ import annotations

from typing import Any

import cometrt
from cometrt.bench.workloads import Inputs
from tests.cases import Case, Output, check_case, make_inputs, on_device, on_host
from tests.host.test_orders import batches_of


class PlanRank:
    """One rank with a layer, and plans of numbered micro-batches."""

    def __init__(self, world: Any, case: Case, batches: list[Inputs], tracer: Any = None) -> None:
        self.move, self.rank = on_device(world), world.rank
        self.layer = cometrt.MoELayer(world, case.spec, case.mode, config=case.config)
        if tracer is not None:
            self.layer.tracer = tracer
        first = batches[0]
        self.w_up, self.w_down = map(
            self.move,
            cometrt.shard_weights(first.w_up, first.w_down, world.rank, world.size, case.spec),
        )
        parts = ("x", "ids", "weights", "dy")
        self.batches = [
            {part: self.move(getattr(batch, part)[world.rank]) for part in parts}
            for batch in batches
        ]
        self.plans: dict[int, Any] = {}

    def plan(self, number: int) -> Any:
        batch = self.batches[number]
        self.plans[number] = self.layer.plan(batch["ids"], batch["weights"])
        return self.plans[number]

    def forward(self, number: int, **more: Any) -> Any:
        batch = self.batches[number]
        tables = batch["ids"], batch["weights"]
        return self.layer.forward(batch["x"], *tables, self.w_up, self.w_down, **more)

    def planned_forward(self, number: int, plan: Any = None, **more: Any) -> Any:
        more |= {"w_up": self.w_up, "w_down": self.w_down}
        plan = self.plans[number] if plan is None else plan
        return self.layer.forward(self.batches[number]["x"], plan=plan, **more)

    def backward(self, number: int, y: Any, saved: Any) -> Output:
        grads = self.layer.backward(self.batches[number]["dy"], saved)
        self.layer.synchronize()
        return Output(on_host(y), cometrt.Gradients(*map(on_host, grads)))


def check_planned_bits(
    case: Case, device: str, inputs: Inputs | None = None, timeout_sec: float = 60
) -> None:
    """One batch with and without a plan, twice: equal bits, and right ones. Another plan is made
    between a plan and its use."""
    inputs = inputs or make_inputs(case)

    def fn(world: Any) -> list[Output]:
        rank = PlanRank(world, case, [inputs])
        other = rank.batches[0]["ids"][:1], rank.batches[0]["weights"][:1]
        outputs = []
        for _ in range(2):
            rank.plan(0)
            rank.layer.plan(*other)
            outputs.append(rank.backward(0, *rank.planned_forward(0)))
            outputs.append(rank.backward(0, *rank.forward(0)))
        rank.layer.close()
        return outputs

    results = cometrt.spawn(fn, case.size, device, timeout_sec=timeout_sec)
    check_case(case, inputs, [outputs[0] for outputs in results])
    for rank, outputs in enumerate(results):
        assert len({output.digest() for output in outputs}) == 1, f"rank {rank}"


def check_reuse(
    case: Case,
    order: str,
    device: str,
    tracers: Any = lambda rank: None,
    timeout_sec: float = 60,
) -> None:
    """`order` is a string like "p0 f0 f0 b0 b0": plans, forwards and backwards of micro-batches. A
    forward takes the batch's plan, if there is one. A backward is that of the batch's oldest
    forward. Each batch has one set of bits, those of a forward without a plan."""
    batches = batches_of(case, 2, ("uniform", "skewed"))
    steps = [(step[0], int(step[1:])) for step in order.split()]

    def fn(world: Any) -> list[list[Output]]:
        rank = PlanRank(world, case, batches, tracers(world.rank))
        done: list[list[Any]] = [[], []]
        outputs: list[list[Output]] = [[], []]
        for kind, number in steps:
            if kind == "p":
                rank.plan(number)
            elif kind == "f":
                planned = number in rank.plans
                forward = rank.planned_forward if planned else rank.forward
                done[number].append(forward(number))
            else:
                outputs[number].append(rank.backward(number, *done[number].pop(0)))
        for number in (0, 1):
            outputs[number].append(rank.backward(number, *rank.forward(number)))
        return outputs

    results = cometrt.spawn(fn, case.size, device, timeout_sec=timeout_sec)
    for number, batch in enumerate(batches):
        check_case(case, batch, [outputs[number][0] for outputs in results])
        for rank, outputs in enumerate(results):
            assert len(outputs[number]) > 1 or ("p", number) not in steps
            digests = {output.digest() for output in outputs[number]}
            assert len(digests) == 1, f"rank {rank}, batch {number}"
