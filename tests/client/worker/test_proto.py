import subprocess
import sys
from pathlib import Path

import pytest

from bora_fl.client.worker import worker_pb2

ROOT = Path(__file__).resolve().parents[3]
PROTO = "bora_fl/client/worker/worker.proto"


def test_the_generated_messages_are_those_of_the_schema(tmp_path: Path):
    pytest.importorskip("grpc_tools")
    out = tmp_path / "worker.descriptor"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={out}", PROTO]
    subprocess.run(command, cwd=ROOT, check=True)
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    ours = type(file).FromString(worker_pb2.DESCRIPTOR.serialized_pb)
    for message in file.message_type:
        for field in message.field:
            field.ClearField("json_name")
    assert file == ours, "run `make proto`"
