"""Launch CI runners on any cloud, for any git forge."""

__version__ = "0.1.0"
