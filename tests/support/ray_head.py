"""What listens where a Ray head is expected: nothing of Ray, or a head of another version."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from concurrent import futures

import grpc
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc


@contextlib.contextmanager
def silent_listener() -> Iterator[socket.socket]:
    """A socket that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield listener


class _Nodes(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
    def GetClusterId(self, request, context):
        return gcs_service_pb2.GetClusterIdReply(cluster_id=b"c" * 28)


class _Store(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
    def __init__(self, versions: dict[str, str]) -> None:
        self.versions = versions

    def InternalKVGet(self, request, context):
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(self.versions).encode())


@contextlib.contextmanager
def head_of(ray_version: str, python_version: str) -> Iterator[int]:
    """The port of a head that says that it runs these versions."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    versions = {"ray_version": ray_version, "python_version": python_version}
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(_Nodes(), server)
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(_Store(versions), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0)
