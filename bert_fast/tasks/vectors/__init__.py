"""Texts into vectors, and vectors searched: files larger than memory, on one machine or several."""

from .embed import Progress, Summary, embed
from .embedder import Options
from .indexes import IndexOptions
from .ray_engine import Cluster
from .search import Hits, search
from .searcher import Found, Searcher

__all__ = [
    "Cluster",
    "Found",
    "Hits",
    "IndexOptions",
    "Options",
    "Progress",
    "Searcher",
    "Summary",
    "embed",
    "search",
]
