"""Datasets that a config names, the generated shapes, and loaders whose order a resumed run continues."""

from .augmentation import AUGMENTATION_REGISTRY, DATASET_MAPPER_REGISTRY, build_mapper
from .batches import batched_test_loader
from .builtin_voc import register_builtin_voc
from .check import DataPlan, check_dataset, check_plan, raised
from .check_config import check_datasets
from .coco import adopt_coco_datasets
from .config_loader import train_loader_of_config, training_records
from .custom import register_custom_datasets
from .custom_entries import check_name, datasets_root, with_absolute_paths
from .loader import ShieldedLoader, build_train_loader, end_workers, example_batches
from .read_errors import NamedReadErrors
from .repeating import RepeatingImages, repeating_images
from .sampler import ResumableTrainingSampler, sampler_of_config, seeded
from .shapes import generate_shapes, register_shapes
from .statistics import BoxStatistics, box_statistics
from .unreadable import skip_unreadable

__all__ = [
    "AUGMENTATION_REGISTRY",
    "DATASET_MAPPER_REGISTRY",
    "BoxStatistics",
    "DataPlan",
    "NamedReadErrors",
    "RepeatingImages",
    "ResumableTrainingSampler",
    "ShieldedLoader",
    "adopt_coco_datasets",
    "batched_test_loader",
    "box_statistics",
    "build_mapper",
    "build_train_loader",
    "check_dataset",
    "check_datasets",
    "check_name",
    "check_plan",
    "datasets_root",
    "end_workers",
    "example_batches",
    "generate_shapes",
    "raised",
    "register_builtin_voc",
    "register_custom_datasets",
    "register_shapes",
    "repeating_images",
    "sampler_of_config",
    "seeded",
    "skip_unreadable",
    "train_loader_of_config",
    "training_records",
    "with_absolute_paths",
]
