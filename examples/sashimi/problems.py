"""What a user can put right."""

from __future__ import annotations


class Problem(Exception):
    """Something that was handed over cannot be used; the message says in one sentence what, and what to do."""
