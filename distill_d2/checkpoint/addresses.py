"""Addresses of checkpoints, and downloads."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from detectron2.utils.file_io import PathManager

_HUGGING_FACE = ("https://huggingface.co/", "https://hf.co/")


def direct_address(path: str) -> str:
    """The download address of a file at huggingface.co, from the address of its page or its download;
    any other path or address is returned unchanged."""
    if not path or not path.startswith(_HUGGING_FACE):
        return path
    address = urlsplit(path)
    query = [part for part in address.query.split("&") if not part.startswith("download")]
    direct = address.path.replace("/blob/", "/resolve/", 1)
    return address._replace(path=direct, query="&".join(query)).geturl()


def local_file(path: str) -> str:
    """The file of a path or URL on this machine; downloads are kept in the cache.

    Args:
        path: may end in a query such as "?matching_heuristics=True", which is dropped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the download failed.
    """
    path = direct_address(path).partition("?")[0]
    if "://" not in path:
        if os.path.isdir(path):
            raise FileNotFoundError(f"checkpoint '{path}' is a folder; give a file in it")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"checkpoint '{path}' does not exist")
        return path
    try:
        local = PathManager.get_local_path(path)
    except OSError as error:
        raise ValueError(
            f"the checkpoint '{path}' could not be downloaded: {_first_line(error)}. Download it by other "
            "means and set MODEL.WEIGHTS, or for a teacher MODEL.DISTILLER.TEACHER_WEIGHTS, to its path"
        ) from error
    if not os.path.isfile(local):  # PathManager takes an address that it does not know for a path
        raise FileNotFoundError(
            f"checkpoint '{path}' cannot be downloaded: expected http://, https:// or detectron2://, or a path"
        )
    return local


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
