"""``--workers ray``: a search that measures on a Ray cluster, or on one that it starts here."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...ir.canonical.families import canonicalize
from ...ir.core.errors import BadInput, Missing
from ...ir.core.view import View
from ...ir.structure.recognize import recognize
from ...passes.recipe import Recipe
from .data import Parts
from .judge import Judge
from .measure import measured

RAY = "ray"
ADDRESS = "RAY_ADDRESS"
"""Where Ray reads from which cluster it is to join; without it, it starts one on this machine."""
REACHED_WITHIN = 10.0
"""Seconds."""
LOADABLE = frozenset({"hf", "zoo", "onnx", "gguf", "pt2"})
"""Kinds of sources that another machine can load by their names."""
RESTARTS = 2
"""Of a worker that dies, and of the recipe that it was at."""


class Measuring:
    """One worker: the graph, loaded anew where the first recipe comes, and its judge, on one
    thread."""

    def __init__(self, load: Callable[[], View], names: Sequence[str], data: Parts) -> None:
        self._load, self._names, self._data = load, names, data
        self._known: tuple[View, Judge] | None = None

    def measure(self, place: int, text: str) -> tuple[int, Any]:
        """The place of a recipe, and what is measured of it."""
        torch.set_num_threads(1)
        graph, judge = self._known = self._known or self._judged()
        return place, measured(graph, judge, self._data.fit, Recipe.parse(text))

    def _judged(self) -> tuple[View, Judge]:
        graph = self._load()
        if tuple(graph.input_names()) != tuple(self._names):
            raise BadInput(
                f"{graph.source.name} as workers load it takes {', '.join(graph.input_names())}, "
                f"and the graph that is searched {', '.join(self._names)}: give reload=, which "
                "makes the same graph"
            )
        source = graph.copy()
        canonicalize(source)
        return graph, Judge(source, recognize(source), self._data.judge)


class OnRay:
    """As many workers as the cluster has processors, at most one for each recipe of a round.

    A worker that dies is started again, and its recipe measured again, by Ray. Raises ``Missing``
    where Ray or the cluster of ``RAY_ADDRESS`` is not there, ``BadInput`` for a graph that no other
    process can load.
    """

    def __init__(self, graph: View, data: Parts, load: Callable[[], View] | None) -> None:
        if load is None and graph.source.kind not in LOADABLE:
            raise BadInput(
                f"workers on Ray load the model by its name, and {graph.source.name} is a graph of "
                "memory: give workers=N, which are processes of this machine"
            )
        self._ray = _connected()
        self._graph, self._load = graph, load or _by_name(graph.source.name)
        self._data = self._ray.put(data)
        self._actors: list[Any] = []

    def run(
        self, tasks: Sequence[Any], begin: Callable[[int], None], done: Callable[[int, Any], None]
    ) -> None:
        processors = int(self._ray.cluster_resources().get("CPU", 1))
        count = min(len(tasks), max(1, processors))
        while len(self._actors) < count:
            self._actors.append(self._actor())
        pool = importlib.import_module("ray.util").ActorPool(self._actors)
        for place, recipe in enumerate(tasks):
            begin(place)
            pool.submit(lambda actor, task: actor.measure.remote(*task), (place, str(recipe)))
        while pool.has_next():
            try:
                done(*pool.get_next_unordered())
            except self._ray.exceptions.RayActorError as error:
                raise BadInput(f"a worker on Ray died {RESTARTS + 1} times: {error}") from None

    def _actor(self) -> Any:
        settings = {"num_cpus": 1, "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        names = self._graph.input_names()
        return self._ray.remote(**settings)(Measuring).remote(self._load, names, self._data)

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()


def _by_name(name: str) -> Callable[[], View]:
    def load() -> View:
        from ...ir.load.sources import load as load_model

        return load_model(name)

    return load


def _connected() -> Any:
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise Missing(
            "workers on Ray need it: pip install 'graphwright[ray]', or give --workers N, which "
            "are processes of this machine"
        ) from None
    if not ray.is_initialized():
        where = os.environ.get(ADDRESS, "")
        try:
            _reach(where)
            ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
        except (OSError, ValueError, RuntimeError) as error:
            place = where or "this machine"
            raise Missing(f"no Ray cluster at {place} ({ADDRESS}): {error}") from None
    return ray


def _reach(address: str) -> None:
    """Raise ``OSError`` where nothing listens at a host and port: Ray itself goes on asking for
    minutes, and says so on the terminal."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), REACHED_WITHIN).close()
