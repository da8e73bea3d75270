"""The ServerApp and the ClientApp, those of bora_fl: settings and strategy say what is this app's own."""

from bora_fl.client.app import app as client
from bora_fl.server.app import app as server

__all__ = ["client", "server"]
