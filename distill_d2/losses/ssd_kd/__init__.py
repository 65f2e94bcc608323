"""SSDKD: learning efficient object detectors (Chen et al., NIPS 2017)."""

from .loss import SSDKD

__all__ = ["SSDKD"]
