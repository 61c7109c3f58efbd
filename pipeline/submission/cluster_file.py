"""The cluster file: Ray's own launcher configuration, with our settings under `metadata.overfill`.

Ray does not look at `metadata`, so the file that starts a cluster also says where results go on it, which MLflow it
logs to and what a stage gets there. Here only those settings are read, and the node types, from which follows what an
autoscaler may add; everything else is Ray's to check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from overfill.config import Frozen
from overfill.errors import UserError
from pipeline.config_io import parse_yaml, read_text, validate
from pipeline.submission.fitting import NodeShape

DEFAULT_FILE = "cluster.yaml"


class ClusterSettings(Frozen):
    """`metadata.overfill` of a cluster file."""

    store: str | None = None
    """Folder of results, on storage that every node mounts; `--store` goes before it."""
    tracking_uri: str | None = None
    """MLflow's address, for MLFLOW_TRACKING_URI of the job; a database in the store when left out."""
    resources: Annotated[dict[str, Any], Field(default_factory=dict)]
    """What a stage gets on this cluster where the experiment file does not say; as `resources` of an experiment."""
    image: str | None = None
    """Container image with the dependencies of this package, for `--manifest kuberay`."""


@dataclass(frozen=True)
class ClusterFile:
    """What a cluster file says to us."""

    path: str
    settings: ClusterSettings
    nodes: tuple[NodeShape, ...] = ()
    """Node types with as many nodes as the autoscaler may start; only those whose resources the file gives."""


def read_cluster_file(path: str | None) -> ClusterFile | None:
    """The cluster file at `path`; when none is given, `cluster.yaml` of the working folder, or None without one.

    Raises UserError for a file that cannot be read and for settings that do not fit."""
    if path is None and not Path(DEFAULT_FILE).is_file():
        return None
    where = path or DEFAULT_FILE
    content = parse_yaml(read_text(Path(where)), where)
    if not isinstance(content, dict) or "cluster_name" not in content:
        raise UserError(f"{where}: not a cluster file of Ray (no `cluster_name`); see cluster.yaml of this project")
    own = _mapping(_mapping(content.get("metadata")).get("overfill"))
    settings = validate(ClusterSettings, own, f"{where}: metadata.overfill")
    return ClusterFile(where, settings, tuple(_node_types(content)))


def _node_types(content: Mapping[str, Any]) -> list[NodeShape]:
    head = content.get("head_node_type")
    found = []
    for name, kind in _mapping(content.get("available_node_types")).items():
        resources = _mapping(_mapping(kind).get("resources"))
        count = 1 if name == head else int(_mapping(kind).get("max_workers", content.get("max_workers", 0)))
        if resources and count:
            found.append(NodeShape({key: float(value) for key, value in resources.items()}, count))
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
