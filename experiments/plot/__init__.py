"""Figures of a comparison: functions that return matplotlib figures, which is imported only when one is drawn."""
