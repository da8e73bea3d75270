"""Data: read, check, deal to clients, tokenize once per process, batch. See docs/data.md."""

from bora_fl.data.clients import ClientData, client_data, draw_batches, loads, test_data
from bora_fl.data.embedded import FetchError, fetch
from bora_fl.data.encoded import Encoded
from bora_fl.data.loading import RawData, load_dataset, source_fingerprint
from bora_fl.data.pairs import Pairs
from bora_fl.data.partitions import partition
from bora_fl.data.picture import partition_picture
from bora_fl.data.tokenizing import tokenize

__all__ = [
    "ClientData",
    "Encoded",
    "FetchError",
    "Pairs",
    "RawData",
    "client_data",
    "draw_batches",
    "fetch",
    "load_dataset",
    "loads",
    "partition",
    "partition_picture",
    "source_fingerprint",
    "test_data",
    "tokenize",
]
