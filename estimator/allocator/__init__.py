"""A model of PyTorch's CUDA caching allocator, without torch and without a device.

``CachingAllocator`` is its entry; ``python -m estimator.allocator TRACE.json.gz`` replays a recorded trace through it.
"""

from estimator.allocator.caching import CachingAllocator, OutOfMemoryError

__all__ = ["CachingAllocator", "OutOfMemoryError"]
