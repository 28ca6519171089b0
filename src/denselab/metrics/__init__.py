"""Counts and scores in numpy; nothing here needs torch."""

from denselab.metrics.semantic import SemanticFigures as SemanticFigures
from denselab.metrics.semantic import SemanticScore as SemanticScore
from denselab.metrics.semantic import confusion as confusion
