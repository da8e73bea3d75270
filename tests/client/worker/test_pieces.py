import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from bora_fl.client.worker.pieces import CHUNK_BYTES, Assembly, chunks
from bora_fl.client.worker.worker_pb2 import Chunk


def assembled(records: RecordDict, part: Chunk.Part = Chunk.CONTENT) -> Assembly:
    assembly = Assembly()
    for chunk in chunks(records, part):
        assert len(chunk.data) <= CHUNK_BYTES
        assembly.add(Chunk.FromString(chunk.SerializeToString()))
    return assembly


def test_records_arrive_as_they_were_sent():
    big = np.random.default_rng(0).standard_normal(CHUNK_BYTES // 8 * 3 + 5)
    records = RecordDict(
        {
            "state": ArrayRecord({"z": Array(big), "a": Array(np.zeros((0, 3), np.float32))}),
            "empty": ArrayRecord({}),
            "metrics": MetricRecord({"loss": 0.5, "n": [1, 2]}),
            "instruction": ConfigRecord({"round": 3, "trains": ["A", "B"], "raw": b"\x00\xff"}),
        }
    )
    assembly = assembled(records)
    assert assembly.content == records
    assert list(assembly.content) == list(records)
    assert list(assembly.content.array_records["state"]) == ["z", "a"]
    assert not assembly.memory


def test_memory_is_kept_apart():
    records = RecordDict({"metrics": MetricRecord({"n": 1})})
    assembly = assembled(records, Chunk.MEMORY)
    assert assembly.memory == records
    assert not assembly.content


def test_garbage_is_an_error_in_words():
    with pytest.raises(ValueError, match="not a record"):
        Assembly().add(Chunk(data=b"\xff" * 100, last=True))
