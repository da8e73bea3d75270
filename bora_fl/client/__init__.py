"""The client: local training, private or not, and what a site keeps.

Importing it registers the adapter's per-sample gradients with Opacus.
"""

from bora_fl import preload as _preload  # noqa: F401
from bora_fl.client import grad_sample as _grad_sample  # noqa: F401
