"""From a folder of data to configs of a teacher, a student and its distillation that fit it."""

from __future__ import annotations

import os


def check_data_folder(path: str) -> None:
    """Raises FileNotFoundError or NotADirectoryError if it is no folder."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"DATA_FOLDER '{path}' does not exist; give the folder of the dataset")
    if not os.path.isdir(path):
        raise NotADirectoryError(
            f"DATA_FOLDER '{path}' is a file; give the folder that holds the dataset"
        )
