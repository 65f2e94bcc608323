"""A trained detector, whole, that finds objects as its evaluation does."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.structures import Instances
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn

from ..data import build_mapper, register_builtin_voc, register_shapes
from ..data.classes import classes_in, classes_of, classes_of_config
from ..mistakes import UnreadableRecord
from ..quiet import quiet
from ..teacher.loading import load_whole
from ..views import view_type
from .sources import Source, build_detector, find_run

# detectron2's, where a LazyConfig has no mapper.
_RESIZE = T.ResizeShortestEdge(800, 1333)


@dataclass
class Trained:
    """A trained detector.

    Attributes:
        model: in eval, with its weights.
        cfg: its config; of a LazyConfig the whole DictConfig.
        classes: their names, by number.
        source: where config and weights come from, for messages.
        mapper: of its evaluation, from a dataset dict to an input of the model.
    """

    model: nn.Module
    cfg: CfgNode | DictConfig
    classes: list[str]
    source: str
    mapper: Any

    def predict(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Find objects; each image is a batch of its own, resized as in the evaluation.

        Args:
            images: (H, W, 3) uint8, BGR; of any size.

        Returns:
            for each image ``pred_boxes``, ``scores``, ``pred_classes`` and, where the model finds them,
            ``pred_masks`` (N, H, W) and ``pred_keypoints`` (N, K, 3), in pixels of the image, on the CPU.

        Raises:
            UnreadableRecord: an image is too narrow to be resized.
            ValueError: an image has another form; the model finds no objects (a semantic segmentor).
        """
        return [self._predict(image) for image in images]

    def inputs(self, image: np.ndarray) -> dict[str, Any]:
        """The model's input for an image (H, W, 3), uint8, BGR: "image" (C, H', W'), "height" and "width".

        Raises:
            UnreadableRecord, ValueError: see ``predict``.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f"the image has shape {image.shape} and type {image.dtype}; expected (H, W, 3), uint8, BGR"
            )
        height, width = image.shape[:2]
        if type(self.mapper) is DatasetMapper:
            pixels = convert_PIL_to_numpy(
                Image.fromarray(np.ascontiguousarray(image[..., ::-1])), self.mapper.image_format
            )
            resized = T.AugInput(pixels)
            try:
                self.mapper.augmentations(resized)
            except ValueError as error:  # of Pillow, where no row or column is left
                raise UnreadableRecord(
                    f"the image, {width} x {height} pixels, cannot be resized as in the evaluation: {error}"
                ) from error
            tensor = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
            return {"image": tensor, "height": height, "width": width}
        with tempfile.TemporaryDirectory() as folder:  # a mapper of the user's reads files
            path = os.path.join(folder, "image.png")
            cv2.imwrite(path, image)
            record = {"file_name": path, "image_id": 0, "height": height, "width": width}
            return {**self.mapper(record), "height": height, "width": width}

    @torch.no_grad()
    def _predict(self, image: np.ndarray) -> Instances:
        output = self.model([self.inputs(image)])[0]
        if "instances" not in output:
            raise ValueError(
                f"the detector of {self.source}, a {type(self.model).__name__}, finds no objects: it returns "
                f"{sorted(output)}"
            )
        return output["instances"].to("cpu")


def load_trained(run: str, weights: str = "", device: str = "cpu") -> Trained:
    """Build a trained detector and load its weights. Neither its training data nor its teacher need exist.

    Args:
        run: the OUTPUT_DIR of a training, of which model_best.pth is taken, or model_final.pth, or the last whole
            checkpoint; or a config with weights; or one file of `distill-d2 export`. See ``find_run``.
        weights: path or address of other weights.
        device: of torch.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: something is missing or cannot be read; the weights do
            not fill the model. The message names the file or key.
    """
    return load_source(find_run(run, weights), device)


def load_source(source: Source, device: str = "cpu") -> Trained:
    """``load_trained`` of what ``find_run`` has found."""
    if not source.weights:
        raise ValueError(
            f"the config '{source.name}' names no weights (MODEL.WEIGHTS); give them (--weights)"
        )
    if isinstance(source.config, CfgNode) and source.config.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            f"the detector of '{source.name}' reads proposals from files (MODEL.LOAD_PROPOSALS is True), which "
            "new images do not have"
        )
    model = build_detector(source, device)
    with quiet():  # what is wrong with the weights is an error
        _, loaded = load_whole(
            model,
            source.weights,
            what=f"the weights of '{source.name}',",
            advice="Give the weights of a training with this config",
        )
    if isinstance(source.config, CfgNode):
        source.config.MODEL.WEIGHTS = source.weights
    return Trained(
        model=model,
        cfg=source.config,
        classes=_classes(loaded, source, model),
        source=source.name if source.weights == source.name else f"{source.name} ({source.weights})",
        mapper=_mapper(source.config),
    )


def _classes(loaded: dict[str, Any], source: Source, model: nn.Module) -> list[str]:
    register_shapes()
    register_builtin_voc()
    config = source.config
    if isinstance(config, CfgNode):
        named = classes_of_config(config)
    else:
        names = OmegaConf.select(config, "dataloader.train.dataset.names") or ()
        named = classes_of([names] if isinstance(names, str) else list(names))
    classes = classes_in(loaded) or named or []
    count = view_type(model)(model, "student").num_classes
    if count in (None, len(classes)):
        return classes
    return [str(number) for number in range(count)]


def _mapper(config: CfgNode | DictConfig) -> Any:
    if isinstance(config, CfgNode):
        config = config.clone()
        if not config.INPUT.MAPPER:
            config.MODEL.KEYPOINT_ON = False  # else detectron2 asks for the training data
        return build_mapper(config, is_train=False)
    node = OmegaConf.select(config, "dataloader.test.mapper")
    if node is None:
        return DatasetMapper(is_train=False, augmentations=[_RESIZE], image_format="BGR")
    return instantiate(copy.deepcopy(node))
