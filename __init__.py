"""sievit: co-design of sparse vision transformers and the hardware that runs them.

The parts are imported by name (``from sievit.sparsify import threshold``); importing
``sievit`` itself loads neither torch nor matplotlib.
"""

__version__ = "0.1.0"

from .moved import forward_modules

forward_modules()
