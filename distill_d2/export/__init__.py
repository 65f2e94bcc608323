"""Trained detectors as files that run without distill_d2, or with less of it.

from distill_d2.export import check_images, export
from distill_d2.inference import load_trained

exported = export(load_trained("output/pkd"), "pkd.onnx", "onnx", check_images(trained))
outputs = exported.run(tensor)
"""

from .exporting import FORMATS, Exported, check_images, export, export_graph
from .weights import export_weights

__all__ = ["FORMATS", "Exported", "check_images", "export", "export_graph", "export_weights"]
