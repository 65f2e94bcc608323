"""The photos: a folder of COCO form, and the test set that is named beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

TRAIN, VAL, TEST = (f"animals_{split}" for split in ("train", "val", "test"))


@dataclass(frozen=True)
class Photos:
    """Files of annotations, and folders of images.

    Attributes:
        folder: with annotations/train.json, annotations/val.json and images/.
        test: the annotations of the test set; by default annotations/test.json.
        test_images: by default images/.
    """

    folder: Path
    test: Path
    test_images: Path

    @classmethod
    def of(cls, folder: str, test: str = "", test_images: str = "") -> Photos:
        """
        Raises:
            FileNotFoundError: a file or folder does not exist.
        """
        root = Path(folder).expanduser().resolve()
        own = root / "annotations" / "test.json"
        found = cls(
            root,
            Path(test).expanduser().resolve() if test else own,
            Path(test_images).expanduser().resolve() if test_images else root / "images",
        )
        for path, option in (
            *((path, "--data") for path in (*found.annotations.values(), root / "images")),
            (found.test, "--test" if test else "--data"),
            (found.test_images, "--test-images"),
        ):
            if not path.exists():
                raise FileNotFoundError(
                    f"{option}: '{path}' does not exist; expected a folder with annotations/train.json, "
                    "val.json and test.json in COCO's form and images/, as docs/proof.md says"
                )
        return found

    @property
    def annotations(self) -> dict[str, Path]:
        """Of what is trained on and what settings are chosen by."""
        return {name: self.folder / "annotations" / f"{name}.json" for name in ("train", "val")}

    @property
    def test_name(self) -> str:
        """Of the folder of a test set's results: other annotations never meet in one folder."""
        if self.test == self.folder / "annotations" / "test.json":
            return "test"
        return f"test-{self.test.stem}-{digest(self.test)[:8]}"

    def training_options(self) -> list[str]:
        """KEY VALUE words that name the datasets of a training; the test set is not among them."""
        return ["DATASETS.CUSTOM", json.dumps(self._entries())]

    def test_options(self) -> list[str]:
        """KEY VALUE words of an evaluation on the test set."""
        entries = [*self._entries(), _entry(TEST, self.test, self.test_images)]
        return ["DATASETS.CUSTOM", json.dumps(entries), "DATASETS.TEST", json.dumps([TEST])]

    def _entries(self) -> list[dict[str, str]]:
        files = self.annotations
        images = self.folder / "images"
        return [_entry(TRAIN, files["train"], images), _entry(VAL, files["val"], images)]

    def digests(self) -> dict[str, str]:
        """What trainings on other annotations differ in."""
        return {f"annotations/{path.name}": digest(path) for path in self.annotations.values()}


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _entry(name: str, file: Path, images: Path) -> dict[str, str]:
    return {"NAME": name, "FORMAT": "coco", "JSON": str(file), "IMAGES": str(images)}
