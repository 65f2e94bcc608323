"""detectron2's own VOC datasets (voc_2007_trainval, ...), also as the official archives lay them out."""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin, register_pascal_voc

from .custom import datasets_root
from .voc import load_voc

_SPLITS = {2007: ("trainval", "train", "val", "test"), 2012: ("trainval", "train", "val")}
_NAMES = {f"voc_{year}_{split}": year for year, splits in _SPLITS.items() for split in splits}


def register_builtin_voc() -> None:
    """Point detectron2's VOC datasets to where they lie below $DETECTRON2_DATASETS as it is now.

    detectron2 knows VOC<year> alone, below what the variable was when it was imported; here
    VOCdevkit/VOC<year> is taken where only that exists. Names that the user has registered stay as
    they are, and so do detectron2's where they are right. Calling it again changes nothing else.
    """
    for name in _NAMES:
        places = builtin_voc_places(name)
        if not places:
            continue
        folder = next(filter(os.path.isdir, places), places[0])
        if MetadataCatalog.get(name).get("dirname") != folder:
            _point_to(name, folder)


def builtin_voc_places(name: str) -> list[str]:
    """The folders in which a VOC dataset of detectron2's may lie, first the one that detectron2
    expects; none for another dataset, and for one that the user has registered under its name."""
    if name not in _NAMES or not _is_builtin(name):
        return []
    folder = f"VOC{_NAMES[name]}"
    return [os.path.join(datasets_root(), *parts) for parts in ((folder,), ("VOCdevkit", folder))]


def _is_builtin(name: str) -> bool:
    """Whether detectron2 registered the name when it was imported, or ``_point_to`` did later."""
    module = DatasetCatalog[name].__module__ if name in DatasetCatalog else None
    if module == register_pascal_voc.__module__:
        # The user may have called it too, for a folder of his own.
        folder = os.path.join(builtin._root, f"VOC{_NAMES[name]}")
        return MetadataCatalog.get(name).get("dirname") == folder
    return module == __name__


def _point_to(name: str, folder: str) -> None:
    """Register a name again, for another folder."""
    metadata = MetadataCatalog.get(name)
    split, classes = metadata.split, metadata.thing_classes
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)  # its values cannot be changed
    DatasetCatalog.register(name, lambda: load_voc(name, folder, split, classes))
    MetadataCatalog.get(name).set(**{**metadata.as_dict(), "dirname": folder})
