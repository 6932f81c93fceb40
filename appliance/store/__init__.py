"""Compiles experts for this box and keeps them: templates, weight segments, what is shared, what is damaged."""
