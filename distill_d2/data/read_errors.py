"""Errors of reading a record name its image."""

from __future__ import annotations

from typing import Any, Callable

from detectron2.data import DatasetMapper

from ..mistakes import UnreadableRecord
from .augmentation import BoxAwareMapper
from .images import refuse_deep_image


class NamedReadErrors:
    """A dataset mapper whose errors name the image."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]):
        self.mapper = mapper
        self.reads_as_detectron2 = type(mapper) in (DatasetMapper, BoxAwareMapper)

    def __call__(self, record: dict[str, Any]) -> Any:
        """Call the mapper; its errors become an UnreadableRecord, with the original as the cause."""
        try:
            if self.reads_as_detectron2:
                refuse_deep_image(record["file_name"])
            return self.mapper(record)
        except Exception as error:
            raise UnreadableRecord(
                f"the image '{record.get('file_name')}' or its annotations cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error
