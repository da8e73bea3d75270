"""The gRPC service of `worker.proto`, by its descriptor: the generated messages are all that code generation is for."""

from typing import Any, Protocol

import grpc

from bora_fl.client.worker import worker_pb2

SERVICE = worker_pb2.DESCRIPTOR.services_by_name["SiteWorker"].full_name
TOKEN_HEADER = "authorization"


class Servicer(Protocol):
    """What answers."""

    def work(self, requests: Any, context: Any) -> Any:
        """`WorkRequest`s in, `WorkResponse`s out."""

    def status(self, request: worker_pb2.StatusRequest, context: Any) -> worker_pb2.StatusResponse:
        """What the worker has done and is doing."""


def add_to(server: Any, servicer: Servicer) -> None:
    """Register the service with a gRPC server."""
    work = grpc.stream_stream_rpc_method_handler(
        servicer.work, worker_pb2.WorkRequest.FromString, worker_pb2.WorkResponse.SerializeToString
    )
    status = grpc.unary_unary_rpc_method_handler(
        servicer.status, worker_pb2.StatusRequest.FromString, worker_pb2.StatusResponse.SerializeToString
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Work": work, "Status": status})])


class Stub:
    """The calls of a client.

    Args:
        channel: An open gRPC channel.
    """

    def __init__(self, channel: Any) -> None:
        self.work = channel.stream_stream(
            f"/{SERVICE}/Work", worker_pb2.WorkRequest.SerializeToString, worker_pb2.WorkResponse.FromString
        )
        self.status = channel.unary_unary(
            f"/{SERVICE}/Status", worker_pb2.StatusRequest.SerializeToString, worker_pb2.StatusResponse.FromString
        )
