from .capture import Capture, capture
from .replay import Replayed, Replayer

__all__ = ["Capture", "Replayed", "Replayer", "capture"]
