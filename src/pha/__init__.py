"""The Parallel Hybrid Architecture: gated state space, attention and feed-forward side by side."""

__version__ = "0.1.0"
