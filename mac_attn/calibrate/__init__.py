"""Options for a model from its own queries and keys: capture a text, replay it, choose.

    from mac_attn.calibrate import calibrate

    calibration = calibrate(model, ids, target_error=0.03)
    calibration.save("model.json")
    cache = MacCache(model, max_length=8192, config=Calibration.load("model.json").configs)

`capture` keeps what a model's attention layers see of a text, `Replayer` decodes it again under any
options and tells the error of every head. `python -m mac_attn.calibrate` does all of it.
"""

from .calibration import Calibration
from .capture import Capture, capture
from .replay import Replayed, Replayer
from .search import calibrate, calibrate_capture, choose, measure

__all__ = [
    "Calibration",
    "Capture",
    "Replayed",
    "Replayer",
    "calibrate",
    "calibrate_capture",
    "capture",
    "choose",
    "measure",
]
