"""Hands out prompts, bounds how stale work may get, and deals batches to the learner ranks."""
