"""Trained detectors as files that run without distill_d2, or with less of it::

from distill_d2.export import check_images, export
from distill_d2.inference import load_trained

trained = load_trained("output/pkd")
images, _ = check_images(trained)
exported = export(trained, "pkd.onnx", "onnx", images)
boxes, scores, classes = exported.run(image)  # (3, H, W), float32
"""

from .exporting import FORMATS, Exported, check_images, export, export_graph
from .weights import export_weights

__all__ = ["FORMATS", "Exported", "check_images", "export", "export_graph", "export_weights"]
