"""Preflight: whether a cluster could ever hold the actors that are asked for.

An actor that no node can hold would wait for ever, so demand is compared with supply first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from precompute.queue import TeacherQueue
from schemas.errors import ResourceError

_KINDS = ("CPU", "GPU")


def check_demand(queues: Sequence[TeacherQueue], nodes: Sequence[Mapping[str, float]]) -> None:
    """Checks that some node can hold one actor of each teacher.

    Args:
        queues: Teachers with work to do.
        nodes: For each living node its total resources, such as ``{"CPU": 8, "GPU": 1}``.

    Raises:
        ResourceError: No node can; the message has demand and supply.
    """
    for queue in queues:
        demand = {"CPU": queue.cpus_per_actor, "GPU": queue.gpus_per_actor}
        if any(all(node.get(kind, 0.0) >= demand[kind] for kind in _KINDS) for node in nodes):
            continue
        raise ResourceError(
            f"teacher {queue.name}: one actor needs {_describe(demand)} on one node, but the cluster has "
            f"{_describe_nodes(nodes)}; lower cpus_per_actor or gpus_per_actor, or use a larger cluster"
        )


def _describe(resources: Mapping[str, float]) -> str:
    return " and ".join(
        f"{resources.get(kind, 0.0):g} {kind}" for kind in _KINDS if kind == "CPU" or resources.get(kind)
    )


def _describe_nodes(nodes: Sequence[Mapping[str, float]]) -> str:
    kinds = sorted({_describe(node) for node in nodes})
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'} ({'; '.join(kinds) or 'none alive'})"
