"""GID in parts: selection of general instances, pooling, feature and relation terms, response terms."""

from .loss import GID
from .selection import GeneralInstances, GeneralInstanceSelection

__all__ = ["GID", "GeneralInstanceSelection", "GeneralInstances"]
