"""Results of a preflight: the rates of each rank, and which ranks and nodes are slow or broken."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fastav.core.errors import listed

# Measurements in the order in which they run: key -> (name, unit of the rate).
MEASURES = {
    "product": ("matrix product", "TFLOP/s"),
    "copy": ("copy", "GB/s"),
    "host": ("host to device", "GB/s"),
    "node": ("all-reduce in the node", "GB/s"),
    "exchange": ("exchange between nodes", "GB/s"),
    "all": ("all-reduce of all ranks", "GB/s"),
}
_OF_THE_JOB = ("all",)  # one rate for all ranks: no single rank is slow by it


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Host, node and device of a rank.

    Attributes:
        rank: Rank number.
        host: Host name of the machine.
        node: Number of the node.
        device: Device, such as `cuda:3`.
        name: Model of the device, such as `NVIDIA H200`; only devices of one model are compared.
        serial: UUID of the device, as `nvidia-smi -L` shows it; empty if it has none.
    """

    rank: int
    host: str
    node: int
    device: str
    name: str
    serial: str = ""

    def describe(self) -> str:
        """Returns the rank with everything that is needed to find its device."""
        words = [f"host {self.host}", self.device, self.name, self.serial]
        return f"rank {self.rank} ({', '.join(word for word in words if word)})"


@dataclass(frozen=True, slots=True)
class RankMeasurement:
    """Measurements of one rank.

    Attributes:
        place: Host, node and device of the rank.
        rates: Key of `MEASURES` -> rate in its unit; None for a rate that is missing.
        broken: Why the rank cannot be used; empty if it passed all checks.
    """

    place: RankPlace
    rates: Mapping[str, float | None] = field(default_factory=dict)
    broken: str = ""

    def describe(self) -> str:
        """Returns the rank and its rates on one line."""
        rates = [describe_rate(key, rate) for key, rate in self.rates.items() if rate is not None]
        return f"{self.place.describe()}: {', '.join([*rates, *filter(None, [self.broken])]) or 'nothing measured'}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Ranks that are slow or broken for one reason.

    Attributes:
        kind: `broken`: the ranks cannot take part in a run. `slow`: they slow it down.
        ranks: The ranks.
        hosts: Their hosts.
        text: The whole fault as one line of text.
        measure: Key of the entry in `MEASURES` in which they are slow; empty for `broken`.
        rate: The lowest rate of these ranks, in the unit of the measurement.
        share: The lowest ratio of a rate to the median of all comparable ranks.
    """

    kind: Literal["broken", "slow"]
    ranks: tuple[int, ...]
    hosts: tuple[str, ...]
    text: str
    measure: str = ""
    rate: float | None = None
    share: float | None = None


def describe_rate(key: str, rate: float) -> str:
    """Returns name and rate of a measurement, such as `matrix product 689 TFLOP/s`."""
    what, unit = MEASURES[key]
    return f"{what} {rate:.0f} {unit}" if rate >= 100 else f"{what} {rate:.3g} {unit}"


def find_faults(found: Sequence[RankMeasurement], slow: float) -> list[Fault]:
    """Returns the ranks that are broken or slow.

    A rank is compared with ranks whose device is of the same model; in the all-reduce within a node, only with ranks
    whose node has the same number of ranks. Ranks of one node that are slow in the same measurement are reported as the
    node.

    Args:
        found: Measurements of every rank, in rank order.
        slow: A rank is slow if its rate is below this fraction of the median (of two ranks, of the faster one). 0: no
            rank counts as slow.
    """
    why = {one.place.rank: one.broken or _missing(one) for one in found}
    reasons = dict.fromkeys(reason for reason in why.values() if reason)
    faults = [_broken([one.place for one in found if why[one.place.rank] == reason], reason) for reason in reasons]
    for key in MEASURES:
        if key not in _OF_THE_JOB:
            faults += _slow(key, found, slow)
    return faults


def _missing(one: RankMeasurement) -> str:
    lost = [MEASURES[key][0] for key, rate in one.rates.items() if rate is None or not math.isfinite(rate) or rate <= 0]
    return f"no measurement of {' and '.join(lost)}" if lost else ""


def _broken(places: Sequence[RankPlace], reason: str) -> Fault:
    hosts = tuple(dict.fromkeys(place.host for place in places))
    return Fault("broken", tuple(p.rank for p in places), hosts, f"{_who(places)}: broken: {reason}")


def _slow(key: str, found: Sequence[RankMeasurement], slow: float) -> Iterator[Fault]:
    """Yields the faults of ranks that are slow in one measurement, one for each node."""
    nodes = [one.place.node for one in found]
    # Two nodes have a single link: both ends are slow, and the cause may be either end.
    both = key == "exchange" and len(set(nodes)) == 2
    groups: dict[int, list[tuple[float, float, RankPlace]]] = {}
    for rate, usual, place in _compared(key, found):
        if rate < slow * usual:
            groups.setdefault(-1 if both else place.node, []).append((rate, usual, place))
    for group in groups.values():
        (rate, usual, _), (most, best, _) = min(group, key=lambda one: one[0]), max(group, key=lambda one: one[0])
        places, share = [place for *_, place in group], min(rate / usual for rate, usual, _ in group)
        span = f" to {most:.3g}" if f"{most:.3g}" != f"{rate:.3g}" else ""
        shares = f"{share:.2f} to {most / best:.2f}" if span else f"{share:.2f}"
        text = f"{_who(places)}: {describe_rate(key, rate)}{span}, {shares} of the median"
        if both:
            text += "; with two nodes, the cause may be either one or the link between them"
        hosts = tuple(dict.fromkeys(place.host for place in places))
        yield Fault("slow", tuple(p.rank for p in places), hosts, text, key, rate, share)


def _compared(key: str, found: Sequence[RankMeasurement]) -> Iterator[tuple[float, float, RankPlace]]:
    """Yields the rate of every rank that can be compared, the median of its comparable ranks, and its place."""
    nodes = [one.place.node for one in found]
    alike: dict[tuple[str, int], list[tuple[float, RankPlace]]] = {}
    for one in found:
        rate = one.rates.get(key)
        if rate is not None and rate > 0 and math.isfinite(rate):
            size = nodes.count(one.place.node) if key == "node" else 0
            alike.setdefault((one.place.name, size), []).append((rate, one.place))
    for group in alike.values():
        usual = statistics.median_high(rate for rate, _ in group)
        yield from ((rate, usual, place) for rate, place in group if len(group) > 1)


def _who(places: Sequence[RankPlace]) -> str:
    """Names ranks: a single rank with its device, ranks of one node as the node, others with their hosts."""
    if len(places) == 1:
        return places[0].describe()
    ranks = listed([str(place.rank) for place in places], 16)
    hosts = list(dict.fromkeys(place.host for place in places))
    if len({place.node for place in places}) == 1:
        return f"node {places[0].node} (host {hosts[0]}), ranks {ranks}"
    return f"ranks {ranks} (host{'s' * (len(hosts) > 1)} {listed(hosts, 8)})"


def medians(found: Sequence[RankMeasurement]) -> dict[str, dict[str, float]]:
    """Returns the median rates: model of the device -> key of `MEASURES` -> median over its ranks."""
    usual: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(one.place.name for one in found):
        of = [one.rates for one in found if one.place.name == name]
        rates = {key: [rate for one in of if (rate := one.get(key)) is not None] for key in MEASURES}
        usual[name] = {key: statistics.median_high(values) for key, values in rates.items() if values}
    return usual


def summary(found: Sequence[RankMeasurement], faults: Sequence[Fault], slow: float) -> str:
    """Returns one line with the number of ranks, their median rates, and whether all are within bounds."""
    usual = medians(found)
    rates = [
        (f"{name}: " if len(usual) > 1 else "") + ", ".join(describe_rate(key, rate) for key, rate in of.items())
        for name, of in usual.items()
    ]
    nodes = len({one.place.node for one in found})
    counted = f"{len(found)} rank{'s' * (len(found) > 1)} on {nodes} node{'s' * (nodes > 1)}"
    compared = f"; all within {slow:g} of the median" if slow and len(found) > 1 and not faults else ""
    return f"preflight: {counted}: {'; '.join(rates) or 'nothing measured'}{compared}"


def table(found: Sequence[RankMeasurement], faults: Sequence[Fault]) -> dict[str, Any]:
    """Returns all results as a JSON object; rates in the units of `MEASURES`."""
    ranks = [{**asdict(one.place), "rates": dict(one.rates), "broken": one.broken} for one in found]
    return {
        "units": {key: unit for key, (_, unit) in MEASURES.items()},
        "ranks": ranks,
        "medians": medians(found),
        "faults": [asdict(fault) for fault in faults],
    }
