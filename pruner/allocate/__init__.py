"""Allocators: who picks one level per site under the latency budget."""

from __future__ import annotations

from zipc.pruner.allocate.dp import BudgetTooSmall, pareto, solve

__all__ = ["BudgetTooSmall", "pareto", "solve"]
