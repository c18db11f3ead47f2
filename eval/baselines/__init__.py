"""Methods to be measured against; each has `push(frames)` and `flush()` like our own upscaler.

`Chunked(load_network("basicvsr", FILE), interval=15, overlap=2)` is BasicVSR on a stream: the network is
loaded once, every clip takes a fresh `Chunked`.
"""

from eval.baselines.chunked import Chunked
from eval.baselines.interpolation import Bicubic, Lanczos
from eval.baselines.weights import NETWORKS, Network, load_network

__all__ = ["NETWORKS", "Bicubic", "Chunked", "Lanczos", "Network", "load_network"]
