"""DATASETS.SKIP_UNREADABLE."""

from pathlib import Path

from detectron2.data import DatasetCatalog
from runs import Job


def test_run_without_the_images_that_cannot_be_read(tmp_path):
    job = Job(tmp_path)
    truncated, missing, *_ = sorted(Path(job.entry["IMAGES"]).iterdir())
    truncated.write_bytes(truncated.read_bytes()[:200])
    missing.unlink()
    job.config.DATASETS.SKIP_UNREADABLE = True
    job.run()
    listed = (job.output / "unreadable_images.txt").read_text()
    assert str(truncated) in listed and str(missing) in listed and listed.count("\n") == 2
    assert len(DatasetCatalog.get(job.config.DATASETS.TRAIN[0])) == 4
