from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkRequest(_message.Message):
    __slots__ = ("job", "chunk")
    JOB_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    job: Job
    chunk: Chunk
    def __init__(self, job: _Optional[_Union[Job, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class WorkResponse(_message.Message):
    __slots__ = ("progress", "chunk")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    progress: str
    chunk: Chunk
    def __init__(self, progress: _Optional[str] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("version", "schema", "kind", "context")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    version: str
    schema: int
    kind: str
    context: bytes
    def __init__(self, version: _Optional[str] = ..., schema: _Optional[int] = ..., kind: _Optional[str] = ..., context: _Optional[bytes] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("part", "data", "last")
    class Part(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        CONTENT: _ClassVar[Chunk.Part]
        MEMORY: _ClassVar[Chunk.Part]
    CONTENT: Chunk.Part
    MEMORY: Chunk.Part
    PART_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    part: Chunk.Part
    data: bytes
    last: bool
    def __init__(self, part: _Optional[_Union[Chunk.Part, str]] = ..., data: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "pid", "uptime_seconds", "base_loads", "data_loads", "trained", "evaluated", "refused", "cancelled", "waiting", "current")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASE_LOADS_FIELD_NUMBER: _ClassVar[int]
    DATA_LOADS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    uptime_seconds: float
    base_loads: int
    data_loads: int
    trained: int
    evaluated: int
    refused: int
    cancelled: int
    waiting: int
    current: str
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., uptime_seconds: _Optional[float] = ..., base_loads: _Optional[int] = ..., data_loads: _Optional[int] = ..., trained: _Optional[int] = ..., evaluated: _Optional[int] = ..., refused: _Optional[int] = ..., cancelled: _Optional[int] = ..., waiting: _Optional[int] = ..., current: _Optional[str] = ...) -> None: ...
