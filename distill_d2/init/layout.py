"""Find out in which form a folder holds a dataset."""

from __future__ import annotations

from .coco import find_coco
from .folder import Folder
from .parts import Layout
from .voc import find_voc
from .yolo import find_yolo

#: In the order in which they are looked for.
_FINDERS = {"yolo": find_yolo, "voc": find_voc, "coco": find_coco}
_EXPECTED = """one of
  VOC:  xml files and images, in Annotations/, JPEGImages/ and ImageSets/Main/*.txt or in folders of any name
  COCO: json files with "images", "annotations" and "categories", and the images that they name
  YOLO: text files, "class x y width height" per line, and images of the same names, in labels/ and images/ or
        side by side, with the names of the classes in a data.yaml or classes.txt
Files or folders called train and val are a split; without one the images are split here"""


def find_layout(root: str, kind: str = "") -> Layout:
    """How the folder ``root`` holds a dataset.

    Args:
        kind: the FORMAT to look for: voc, coco or yolo; "": the first that is there.

    Raises:
        OSError: there is no such folder, or a file in it cannot be read.
        ValueError: it holds no dataset, or it is not clear which files are meant; the message says what was found.
    """
    folder = Folder.read(root)
    for name in (kind,) if kind else _FINDERS:
        found = _FINDERS[name](folder) if folder.images else None
        if found:
            return found
    form = f" in the form {kind}" if kind else ""
    raise ValueError(f"'{root}' holds no dataset{form}, but {folder.describe()}; expected {_EXPECTED}")
