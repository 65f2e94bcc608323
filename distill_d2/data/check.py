"""Find what is wrong with the datasets of a run before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Callable

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..quiet import quiet
from .builtin_voc import builtin_voc_places
from .classes import check_same_classes, classes_of
from .coco_reading import kept_content
from .custom_entries import check_name, datasets_root
from .image_files import check_image_files, is_local
from .keypoints import check_keypoints
from .mapper_trial import MapperNeeds, try_mapper
from .records import check_records
from .sample import has_objects
from .summary import DatasetSummary, summarize, summary_table
from .voc import check_evaluated_ids

logger = logging.getLogger(__name__)

_CHECK_KEY = "DATASETS.CHECK, of a LazyConfig dataloader.check, is 'none'"


@dataclass(frozen=True)
class DataPlan:
    """What a run reads, and what is known of how it reads it.

    Attributes:
        train, test: names of datasets.
        keys: the config keys of both.
        check: whether their content is checked: DATASETS.CHECK.
        check_images: the number of images of each dataset to decode, at most: DATASETS.CHECK_IMAGES.
        classes: config key and value of the model's number of classes; None: not known.
        need_annotations: whether training needs at least one.
        need_files: whether each record must name a file; a user's mapper may do without.
        keypoints: the number that the model learns.
        min_keypoints: visible ones of an image that is trained on.
        skip_empty: whether images without objects are left out of training.
        mapper: builds the mapper of training; None: not known.
        needs: what the model needs of its output.
        try_evaluation: of a test dataset's name and dicts.
    """

    train: Sequence[str] = ()
    test: Sequence[str] = ()
    keys: tuple[str, str] = ("DATASETS.TRAIN", "DATASETS.TEST")
    check: bool = True
    check_images: int = 0
    classes: tuple[str, int] | None = None
    need_annotations: bool = True
    need_files: bool = True
    keypoints: int = 0
    min_keypoints: int = 0
    skip_empty: bool = True
    mapper: Callable[[], Callable[[dict[str, Any]], Any]] | None = None
    needs: MapperNeeds = MapperNeeds()
    try_evaluation: Callable[[str, list[dict[str, Any]]], None] | None = None


def raised(error: Exception) -> None:
    """Raises the error."""
    raise error


def check_plan(plan: DataPlan, told: Callable[[Exception], None] = raised) -> None:
    """Check each dataset with ``check_dataset``, that all have the same classes in the same order, that the mapper
    of training gives what the model needs, and that the evaluator of each test dataset works; log a table of what
    they hold.

    Args:
        told: is called with the error of a dataset; if it returns, the others are checked, too.

    Raises:
        ValueError: a dataset is not registered or does not fit the model, or another one.
        OSError: annotations or images do not exist or cannot be read.
    """
    found: list[str] = []
    for key, names in zip(plan.keys, (plan.train, plan.test)):
        for name in names:
            with _telling(told):
                _check_registered(name, key)
                found.append(name)
    names = list(dict.fromkeys(found))
    if not plan.check:
        logger.info(f"Data: {', '.join(names)}; neither checked nor counted ({_CHECK_KEY})")
        return
    like, rows = "", []
    for name in names:
        with _telling(told), kept_content():
            summary = _check_and_try(name, plan, like)
            rows.append((summary, ", ".join(_uses(name, plan))))
            like = like or (name if classes_of([name]) else "")
    if rows:
        logger.info(f"Data:\n{summary_table(rows)}")


@contextlib.contextmanager
def _telling(told: Callable[[Exception], None]) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        told(error)


def _uses(name: str, plan: DataPlan) -> list[str]:
    return [use for use, names in (("train", plan.train), ("test", plan.test)) if name in names]


def _check_and_try(name: str, plan: DataPlan, like: str) -> DatasetSummary:
    trained_on = name in plan.train
    records = check_dataset(
        name,
        plan.classes,
        plan.check_images,
        need_annotations=trained_on and plan.need_annotations,
        tested=name in plan.test,
        need_files=plan.need_files,
        like=like,
    )
    if trained_on and plan.keypoints:
        check_keypoints(name, records, plan.keypoints, plan.min_keypoints)
    if trained_on and plan.mapper and plan.check_images:
        _try_mapper(name, records, plan)
    if name in plan.test and plan.try_evaluation:
        plan.try_evaluation(name, records)
    return summarize(name, records)


def check_dataset(
    name: str,
    classes: tuple[str, int] | None = None,
    check_images: int = 0,
    need_annotations: bool = True,
    tested: bool = False,
    need_files: bool = True,
    like: str = "",
) -> list[dict[str, Any]]:
    """Check that a dataset is registered, has annotations and images, and fits the model.

    Args:
        name: of the dataset.
        classes: config key and value of the model's number of classes; None: not known.
        check_images: the number of images to decode, at most; the sample is always the same.
        need_annotations: whether at least one image must have an annotation.
        tested: whether an evaluator reads it; see ``check_records``.
        need_files: whether each record must name a file; a user's mapper may do without.
        like: the name of a loaded dataset that has the same classes in the same order; "": none.

    Returns:
        its detectron2 dicts.

    Raises:
        ValueError: unknown name, no images, no annotations, other classes, a category_id that is not a
            class, an image that is unreadable or not as large as its annotation says.
        OSError: annotations or images do not exist or cannot be read.
    """
    _check_registered(name, "the list of datasets")
    dicts = _load(name)
    if not isinstance(dicts, Sequence) or not all(isinstance(record, dict) for record in dicts):
        raise ValueError(
            f"the function of dataset '{name}' returned {dicts!r:.80}; expected a list of dicts"
        )
    if not dicts:
        raise ValueError(f"dataset '{name}' has no images")
    if need_annotations and not any(record.get("annotations") for record in dicts):
        raise ValueError(
            f"dataset '{name}' has no annotations: {len(dicts)} images and no boxes. Images alone are enough "
            "only for losses on features: with train_distill.py, MODEL.DISTILLER.TASK_LOSS_WEIGHT 0 and "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    if need_annotations and not any(map(has_objects, dicts)):
        raise ValueError(
            f"dataset '{name}' has no annotations but crowds (iscrowd), which are not trained on"
        )
    if like:
        advice = (
            "Give all datasets the same categories (of COCO: in the order of their ids), those without objects "
            "included; DATASETS.CUSTOM adds those that a json lacks, if CLASSES names them all"
        )
        check_same_classes(
            f"dataset '{like}'", classes_of([like]), f"dataset '{name}'", classes_of([name]), advice
        )
    _check_classes(name, classes)
    check_records(name, dicts, classes and classes[1], tested, need_files)
    if tested and MetadataCatalog.get(name).get("evaluator_type") == "pascal_voc":
        check_evaluated_ids(name, [record["image_id"] for record in dicts])
    check_image_files(name, dicts, check_images, deep=not need_files)
    return dicts


def _try_mapper(name: str, records: list[dict[str, Any]], plan: DataPlan) -> None:
    trained_on = [record for record in records if is_local(record)]
    if plan.skip_empty:
        trained_on = [record for record in trained_on if has_objects(record)]
    needs = dataclasses.replace(plan.needs, num_classes=len(classes_of([name]) or ()))
    assert plan.mapper is not None
    with quiet():
        try:
            mapper = plan.mapper()
        except Exception as error:  # a user's mapper may raise anything
            raise ValueError(
                f"the mapper of training cannot be built: {type(error).__name__}: {error} (INPUT.MAPPER)"
            ) from error
        try_mapper(name, trained_on, mapper, needs, plan.check_images)


def _check_registered(name: str, key: str) -> None:
    check_name(name, key)
    known = DatasetCatalog.list()
    if name in known:
        return
    custom = [other for other in known if MetadataCatalog.get(other).get("custom_entry")]
    close = difflib.get_close_matches(name, known, n=5)
    advice = f"; the closest names are {close}" if close else ""
    raise ValueError(
        f"{key} names '{name}', which is not registered{advice}; those of DATASETS.CUSTOM are {custom}. Add "
        "your own in DATASETS.CUSTOM; `distill-d2 init FOLDER` writes such an entry"
    )


def _load(name: str) -> list[dict[str, Any]]:
    try:
        return DatasetCatalog.get(name)
    except ImportError as error:
        raise ImportError(
            f"dataset '{name}' needs a Python package that is not installed: {error}", name=error.name
        ) from error
    except FileNotFoundError as error:
        root = datasets_root()
        found = sorted(os.listdir(root))[:20] if os.path.isdir(root) else "does not exist"
        places = builtin_voc_places(name)
        looked = f" (looked for in {places})" if places else ""
        raise FileNotFoundError(
            f"the annotations of dataset '{name}' do not exist: {error.filename or error}{looked}. "
            f"$DETECTRON2_DATASETS, '{root}': {found}. For data of your own, "
            "`distill-d2 init FOLDER` writes configs"
        ) from error


def _check_classes(name: str, classes: tuple[str, int] | None) -> None:
    things = classes_of([name])
    if classes is None or things is None or len(things) == classes[1]:
        return
    raise ValueError(
        f"dataset '{name}' has {len(things)} classes ({', '.join(things[:10])}), but {classes[0]} is "
        f"{classes[1]}; set it to {len(things)}"
    )
