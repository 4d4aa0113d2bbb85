"""Random calls of routers, and what each must return: plain loops over tokens in float64."""

import dataclasses
import math

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from cometrt import router

KINDS = ("softmax", "sigmoid", "sqrt_softplus")
DTYPES = (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
ULPS = 4  # choices so near to each other may be exchanged


@dataclasses.dataclass(frozen=True, eq=False)
class RouterCase:
    """A call of NAME_topk. Its functions are `topk`, `weights` and `backward`."""

    kind: str
    logits: np.ndarray
    k: int
    keywords: dict

    @property
    def topk(self):
        return getattr(router, f"{self.kind}_topk")

    @property
    def weights(self):
        return getattr(router, f"{self.kind}_weights")

    @property
    def backward(self):
        return getattr(router, f"{self.kind}_topk_backward")

    @property
    def allowed(self):
        """Logits [T, E] in float64, -inf where masked."""
        logits, mask = self.logits.astype(np.float64), self.keywords.get("mask")
        return logits if mask is None else np.where(mask, logits, -np.inf)

    def dweights(self, dtype=np.float64):
        rng = np.random.default_rng(self.logits.size)
        return rng.standard_normal((len(self.logits), self.k)).astype(dtype)

    def __repr__(self):
        shown = {
            name: f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else value
            for name, value in self.keywords.items()
        }
        return f"{self.kind} {self.logits.dtype} {self.logits.shape}, K = {self.k}, {shown}"


@st.composite
def router_cases(draw, max_experts=64, max_topk=32, max_tokens=5, dtypes=DTYPES):
    """Any router over any shape, with ties, masks, groups and biases."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_groups = draw(st.sampled_from([1, 1, 2, 3, 4, 8, 32]))
    size = draw(st.integers(1, max(1, max_experts // num_groups)))
    topk_groups = draw(st.integers(1, num_groups))
    k = draw(st.integers(1, min(max_topk, topk_groups * size)))
    shape = (draw(st.integers(0, max_tokens)), num_groups * size)
    logits = draw(st.sampled_from([0.1, 1.0, 10.0, 60.0])) * rng.standard_normal(shape)
    if draw(st.booleans()):  # ties
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[rng.random(shape) < rng.random()] = -np.inf
    keywords = {
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "group_score": draw(st.sampled_from(["max", "top2"])),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "renormalize": draw(st.booleans()),
    }
    if draw(st.booleans()):
        bias = draw(st.sampled_from([0.0, 0.1, 1.0])) * rng.standard_normal(shape[1])
        keywords["bias"] = bias.astype(draw(st.sampled_from([np.float32, np.float64])))
    if mask := draw(st.sampled_from([None, (shape[1],), shape])):
        keywords["mask"] = rng.random(mask) < rng.random()
    logits = logits.astype(draw(st.sampled_from(dtypes)))
    return RouterCase(draw(st.sampled_from(KINDS)), logits, k, keywords)


def score(kind, row, e):
    """The score of expert e, before any bias."""
    x = float(row[e])
    if x == -math.inf:
        return 0.0
    if kind == "softmax":
        largest = max(row)
        return math.exp(x - largest) / math.fsum(math.exp(y - largest) for y in row)
    small = math.exp(-abs(x))
    if kind == "sigmoid":
        return (1.0 if x >= 0 else small) / (1.0 + small)
    return math.sqrt(max(x, 0.0) + math.log1p(small))


def choices(case):
    """[T, E] what decides: score + bias, or the logit where the order is the same; -inf: masked."""
    sums = case.keywords["num_groups"] > 1 and case.keywords["group_score"] == "top2"
    bias = case.keywords.get("bias")
    if bias is None and not sums:
        return case.allowed
    bias = np.zeros(case.logits.shape[1]) if bias is None else bias.astype(np.float64)
    found = np.full(case.logits.shape, -np.inf)
    for row, out in zip(case.allowed, found, strict=True):
        for e in np.flatnonzero(row > -np.inf):
            out[e] = score(case.kind, row, e) + bias[e]
    return found


def groups_of(case, row):
    """The score of each group, [G]."""
    scores = []
    for group in np.split(row, case.keywords["num_groups"]):
        best = sorted(group, reverse=True)[:2]
        both = len(best) == 2 and best[1] > -np.inf and case.keywords["group_score"] == "top2"
        scores.append(sum(best) if both else best[0])
    return np.array(scores)


def order(row):
    """Indices by falling value, of equal ones the lower first."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))


def chosen(case, row):
    """The K ids of one token, -1 where no expert is left, from a row of `choices`."""
    size = len(row) // case.keywords["num_groups"]
    best = set(order(groups_of(case, row))[: case.keywords["topk_groups"]])
    ids = [e for e in order(row) if row[e] > -np.inf and e // size in best][: case.k]
    return ids + [-1] * (case.k - len(ids))


def near(one, other):
    """Whether two choices, or sums of two, are within ULPS units in the last place."""
    return abs(one - other) <= ULPS * np.spacing(max(abs(one), abs(other)))


def check_ids(case, ids):
    """ids [T, K] are those of plain loops, up to choices that are as good as equal."""
    assert ids.shape == (len(case.logits), case.k)
    assert ids.dtype == np.int32
    size = case.logits.shape[1] // case.keywords["num_groups"]
    for row, found in zip(choices(case), ids.tolist(), strict=True):
        expected = chosen(case, row)
        if found == expected:
            continue
        assert [e < 0 for e in found] == [e < 0 for e in expected]
        groups = groups_of(case, row)
        for one, other in zip(found, expected, strict=True):
            if one != other and not near(row[one], row[other]):
                # Another group was as good, and so all its experts may differ.
                left = {e // size for e in found} ^ {e // size for e in expected}
                assert len(left) > 1, (found, expected)
                assert any(near(groups[a], groups[b]) for a in left for b in left if a < b)


def plain_weights(case, logits, ids):
    """Weights [T, K] in float64 of ids, from logits [T, E] that are -inf where masked."""
    found = np.zeros(ids.shape)
    for row, of, out in zip(logits, ids, found, strict=True):
        out[:] = [score(case.kind, row, e) if e >= 0 else 0.0 for e in of]
        if case.keywords["renormalize"] and out.any():
            out /= out.sum()
    return case.keywords["scale"] * found


def weights_are_within_two_ulp(found, expected):
    """Two arrays of float32."""
    assert found.dtype == expected.dtype == np.float32
    assert (np.abs(found - expected) <= 2 * np.spacing(np.abs(expected))).all()
