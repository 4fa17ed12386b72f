"""Train your own network on your own data, or those of trtkern: ``Trainer`` is all that is needed.

>>> from trtkern.train import Trainer
>>> result = Trainer(network, (train, test), loss="trt", epochs=20).fit("runs/mine")
>>> result.final.splits["test"]["accuracy"]

``trtkern train``, its recipes and its sweeps go through the same class. docs/own.md shows it step by step.
"""

from trtkern.own import OwnError
from trtkern.training.callbacks import Callback, CallbackError
from trtkern.training.loop import Trainer
from trtkern.training.measure import Final, Result
from trtkern.training.watch import NonFiniteError

__all__ = ["Callback", "CallbackError", "Final", "NonFiniteError", "OwnError", "Result", "Trainer"]
