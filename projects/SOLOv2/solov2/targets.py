"""What the cells of SOLOv2's grids should predict (Wang et al., arXiv 2003.10152, section 3.3.1; the
assignment of objects to cells is SOLO's, arXiv 1912.04488, section 3.3.1).

An object belongs to the levels whose range has the root of its box's area, and there to the cells that
its central region touches: sigma times its box, around its mask's center of mass, and at most the 3 x 3
cells around that. Each object and cell is an entry of the mask loss; the class of a cell is its last
object's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks

from distill_d2.upload import upload

from .chunks import masks_at_once

Size = tuple[int, int]

_MOST_CELLS = 3  # of an object on a level, per axis


class Objects(NamedTuple):
    """One image's objects.

    Attributes:
        boxes: (G, 4) float32, absolute XYXY; classes: (G,) int64; masks: (G, H, W) bool, not padded.
        most_entries: no fewer than the entries that they have on all levels.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    masks: torch.Tensor
    most_entries: int


class ImageTargets(NamedTuple):
    """What R cells, of all levels, of one image should predict.

    Attributes:
        classes: (R,) int64, K where a cell has no object.
        cell, object: (E,) int64, of each entry of the mask loss; valid: (E,) bool, False for entries
            that only fill up.
        masks: (G, H / stride, W / stride) bool, of the objects on the padded image.
    """

    classes: torch.Tensor
    cell: torch.Tensor
    object: torch.Tensor
    valid: torch.Tensor
    masks: torch.Tensor


class GridTargets:
    """Assigns objects to the cells of the grids.

    How many entries an image has follows from its boxes on the host up to a bound, to which they are
    filled up: nothing waits for the device.
    """

    def __init__(
        self,
        num_classes: int,
        num_grids: Sequence[int],
        scale_ranges: Sequence[tuple[float, float]],
        sigma: float = 0.2,
        max_entries: int = -1,
    ):
        """
        Args:
            num_classes: K, foreground classes.
            num_grids: cells per side of each level's grid.
            scale_ranges: smallest and largest root of the area of a level's boxes, in pixels.
            sigma: sides of the central region relative to those of the box.
            max_entries: of a batch, drawn by chance; -1: all.
        """
        self.num_classes = num_classes
        self.levels = list(zip(num_grids, scale_ranges))
        self.sigma = sigma
        self.max_entries = max_entries

    def objects(self, instances: Instances, padded_size: Size, device: torch.device) -> Objects:
        """One image's ground truth, brought to the device.

        Raises:
            ValueError: it has no masks.
        """
        boxes = instances.gt_boxes.tensor.float()
        classes, masks = instances.gt_classes, bit_masks(instances)
        most = self.most_entries(boxes.cpu(), padded_size)
        return Objects(*(upload(part, device) for part in (boxes, classes, masks)), most)

    @torch.no_grad()
    def __call__(self, objects: Sequence[Objects], padded_size: Size, stride: int) -> list[ImageTargets]:
        """The targets of N images that are padded to (H, W), with masks of this stride in pixels."""
        slots = draw_slots([image.most_entries for image in objects], self.max_entries)
        canvas = tuple(side // stride for side in padded_size)
        return [
            self._of_image(image, count, padded_size, stride, canvas)
            for image, count in zip(objects, slots)
        ]

    def _of_image(
        self, objects: Objects, count: int, padded_size: Size, stride: int, canvas: Size
    ) -> ImageTargets:
        cell, valid = self.cells(objects, padded_size)
        index = torch.arange(cell.shape[1], device=cell.device)[None, :, None].expand_as(cell)
        cell, index, valid = cell.flatten(), index.flatten(), valid.flatten()
        classes = self._classes(objects.classes, cell, index, valid)
        first = valid.float()
        if count < objects.most_entries:  # by chance, but none that only fills up before one that counts
            first = first + torch.rand_like(first)
        chosen = first.sort(descending=True, stable=True).indices[:count]
        masks = downscale(objects.masks, stride, canvas)
        return ImageTargets(classes, cell[chosen], index[chosen], valid[chosen], masks)

    def cells(self, objects: Objects, padded_size: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """The 3 x 3 cells around each object's center, row by row.

        Returns:
            (L, G, 9) int64, their numbers among the cells of all levels, and (L, G, 9) bool, which of
            them are the object's; the numbers of others are 0.
        """
        (x, y), there = centers(objects.masks)
        width, height = (objects.boxes[:, 2:] - objects.boxes[:, :2]).unbind(1)
        numbers, valid, offset = [], [], 0
        for grid, _ in self.levels:
            columns, across = _cells_of_axis(x, width * self.sigma, padded_size[1], grid)
            rows, down = _cells_of_axis(y, height * self.sigma, padded_size[0], grid)
            numbers.append(offset + (rows[:, :, None] * grid + columns[:, None, :]).flatten(1))
            valid.append((down[:, :, None] & across[:, None, :]).flatten(1))
            offset += grid**2
        belongs = self._levels_of(objects.boxes) & there
        found = torch.stack(valid) & belongs[..., None]
        return torch.where(found, torch.stack(numbers), 0), found

    def most_entries(self, boxes: torch.Tensor, padded_size: Size) -> int:
        """No fewer than the entries of objects with these boxes (G, 4), wherever their centers are.

        A region that is r cells long touches at most ceil(r) + 1 of them.
        """
        sides = (boxes[:, 2:] - boxes[:, :2]) * self.sigma
        total = 0
        for (grid, _), belongs in zip(self.levels, self._levels_of(boxes)):
            lengths = sides[belongs] * grid / sides.new_tensor(padded_size[::-1])
            # Rounding may shift a border that a region ends on.
            counts = (lengths + 1e-3).ceil().clamp(min=0) + 1
            total += int(counts.clamp(max=min(_MOST_CELLS, grid)).prod(dim=1).sum())
        return total

    def _levels_of(self, boxes: torch.Tensor) -> torch.Tensor:
        """(L, G) bool: the levels that boxes (G, 4) belong to."""
        scale = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        return torch.stack([(scale >= low) & (scale <= high) for _, (low, high) in self.levels])

    def _classes(
        self, classes: torch.Tensor, cell: torch.Tensor, index: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """The class of each cell's last object."""
        last = classes.new_full((sum(grid**2 for grid, _ in self.levels),), -1)
        last = last.scatter_reduce(0, cell, torch.where(valid, index, -1), "amax")
        with_none = torch.cat([classes, classes.new_full((1,), self.num_classes)])
        return with_none[last]  # -1 is none


def draw_slots(slots: Sequence[int], most: int) -> list[int]:
    """Draw at most ``most`` (-1: all) of the slots of N images at random; the number that each image keeps."""
    if most < 0 or sum(slots) <= most:
        return list(slots)
    image = torch.arange(len(slots)).repeat_interleave(torch.tensor(slots))
    drawn = image[torch.randperm(len(image))[:most]]
    return torch.bincount(drawn, minlength=len(slots)).tolist()


def bit_masks(instances: Instances) -> torch.Tensor:
    """The masks (G, H, W), bool, of one image's ground truth, polygons or bit masks.

    Raises:
        ValueError: it has none.
    """
    if not len(instances):  # detectron2 then has no masks at all
        return torch.zeros(0, *instances.image_size, dtype=torch.bool)
    if not instances.has("gt_masks"):
        raise ValueError(
            "SOLOv2 learns from masks, but the images have none; set MODEL.MASK_ON True, and use a "
            "dataset whose annotations have a segmentation"
        )
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    return masks.tensor


def centers(masks: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Centers of mass of masks (G, H, W): x and y, each (G,), in pixels from the center of the first
    one; and (G,) bool, which masks have one."""
    parts = [
        (part.sum(dim=1), part.sum(dim=2))
        for part in map(torch.Tensor.float, masks.split(masks_at_once(*masks.shape[-2:])))
    ]
    across, down = (torch.cat(counts).long() for counts in zip(*parts))  # sums of positions are large
    area = across.sum(dim=1)
    x, y = (
        (counts * torch.arange(counts.shape[1], device=masks.device)).sum(dim=1) / area.clamp(min=1)
        for counts in (across, down)
    )
    return (x, y), area > 0


def downscale(masks: torch.Tensor, stride: int, canvas: Size) -> torch.Tensor:
    """Masks (G, H, W) at a stride, with the rest of the canvas (H', W') empty: (G, H', W') bool.

    Bilinear, to H / stride and W / stride rounded; a pixel is set from a half on.
    """
    size = [max(1, math.floor(side / stride + 0.5)) for side in masks.shape[-2:]]
    found = masks.new_zeros(len(masks), *canvas)
    at_once = masks_at_once(*masks.shape[-2:])
    for part, place in zip(masks.split(at_once), found.split(at_once)):
        if len(part):
            small = F.interpolate(part[:, None].float(), size, mode="bilinear", align_corners=False)
            place[:, : size[0], : size[1]] = small[:, 0] >= 0.5
    return found


def _cells_of_axis(
    center: torch.Tensor, length: torch.Tensor, side: int, grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The three cells around each of G centers along an axis of ``side`` pixels, (G, 3) int64, and which
    of them the region of this length around the center touches."""

    def cell_of(position: torch.Tensor) -> torch.Tensor:
        return (position / side // (1 / grid)).long()[:, None]

    cells = cell_of(center) + torch.arange(-1, 2, device=center.device)
    first = cell_of(center - 0.5 * length).clamp(min=0)
    last = cell_of(center + 0.5 * length).clamp(max=grid - 1)
    return cells, (cells >= first) & (cells <= last)
