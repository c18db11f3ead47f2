"""Evaluation: metrics, test sets, methods side by side, and the report."""
