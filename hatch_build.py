"""The licence in the metadata of the wheel, as PEP 639 has it: an expression, and the files.

`flwr build` takes an app only if its ``[project].license`` is a table that names a file, and that form gives none.
"""

from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Licence(MetadataHookInterface):
    """Hatchling calls it when it builds."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put PEP 639's two fields in the place of the table."""
        metadata["license-files"] = [metadata["license"]["file"]]
        metadata["license"] = "Apache-2.0"
