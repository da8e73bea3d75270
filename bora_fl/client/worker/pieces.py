"""Flower records as a stream of chunks: one piece per record and array, so that nothing limits an adapter's size."""

from collections.abc import Iterator

from flwr.app import ArrayRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from bora_fl.client.worker.worker_pb2 import Chunk

CHUNK_BYTES = 1 << 20


def chunks(records: RecordDict, part: Chunk.Part) -> Iterator[Chunk]:
    """The chunks of all records, in order.

    Args:
        records: What to send.
        part: Whether it is a message's content or a client's memory.
    """
    for piece in _pieces(records):
        data = recorddict_to_proto(piece).SerializeToString()
        for start in range(0, len(data), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            yield Chunk(part=part, data=data[start:end], last=end >= len(data))


class Assembly:
    """Puts received chunks together.

    Attributes:
        content: The records of the message.
        memory: The records that the client keeps.
    """

    def __init__(self) -> None:
        self.content, self.memory = RecordDict(), RecordDict()
        self._open = {Chunk.CONTENT: bytearray(), Chunk.MEMORY: bytearray()}

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk.

        Raises:
            ValueError: If a piece is not a record of Flower's.
        """
        open_piece = self._open[chunk.part]
        open_piece += chunk.data
        if not chunk.last:
            return
        target = self.memory if chunk.part == Chunk.MEMORY else self.content
        try:
            piece = recorddict_from_proto(ProtoRecordDict.FromString(bytes(open_piece)))
        except Exception as error:  # protobuf and Flower raise what they like at garbage
            raise ValueError(f"a piece of {len(open_piece)} bytes is not a record ({error})") from error
        open_piece.clear()
        for name, record in piece.items():
            if isinstance(record, ArrayRecord) and name in target.array_records:
                target.array_records[name].update(record)
            else:
                target[name] = record


def _pieces(records: RecordDict) -> Iterator[RecordDict]:
    for name, record in records.items():
        if isinstance(record, ArrayRecord) and record:
            for key, array in record.items():
                yield RecordDict({name: ArrayRecord({key: array})})
        else:
            yield RecordDict({name: record})
