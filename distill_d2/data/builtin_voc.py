"""detectron2's own VOC datasets (voc_2007_trainval, ...), also in the layout of the official archives."""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin, register_pascal_voc

from .custom_entries import datasets_root
from .voc import VocFolder, load_voc

_SPLITS = {2007: ("trainval", "train", "val", "test"), 2012: ("trainval", "train", "val")}
_NAMES = {f"voc_{year}_{split}": year for year, splits in _SPLITS.items() for split in splits}


def register_builtin_voc() -> None:
    """Point detectron2's VOC datasets to their folders below the current $DETECTRON2_DATASETS.

    detectron2 only looks for VOC<year>, below the value of the variable at import; this function also
    finds VOCdevkit/VOC<year>. Datasets that the user has registered under these names stay as they are.
    """
    for name in _NAMES:
        places = builtin_voc_places(name)
        if not places:
            continue
        folder = next(filter(os.path.isdir, places), places[0])
        if MetadataCatalog.get(name).get("dirname") != folder:
            _point_to(name, folder)


def builtin_voc_places(name: str) -> list[str]:
    """The folders in which one of detectron2's VOC datasets may lie, first the one that detectron2
    expects; empty for other datasets, and if the user has registered this name."""
    if name not in _NAMES or not _is_builtin(name):
        return []
    folder = f"VOC{_NAMES[name]}"
    return [os.path.join(datasets_root(), *parts) for parts in ((folder,), ("VOCdevkit", folder))]


def _is_builtin(name: str) -> bool:
    """Whether detectron2 registered the name at import, or ``_point_to`` did later."""
    module = DatasetCatalog[name].__module__ if name in DatasetCatalog else None
    if module == register_pascal_voc.__module__:
        # The user may have called register_pascal_voc for another folder.
        folder = os.path.join(builtin._root, f"VOC{_NAMES[name]}")
        return MetadataCatalog.get(name).get("dirname") == folder
    return module == __name__


def _point_to(name: str, folder: str) -> None:
    """Register a name again, for another folder."""
    metadata = MetadataCatalog.get(name)
    split, classes = metadata.split, metadata.thing_classes
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)  # set values are constant
    DatasetCatalog.register(name, lambda: load_voc(name, VocFolder.of_root(folder, split), classes))
    MetadataCatalog.get(name).set(**{**metadata.as_dict(), "dirname": folder})
