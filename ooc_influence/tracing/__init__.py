"""A run from a model and documents to pages: every step in one call that resumes, and its settings as a file."""

from ooc_influence.tracing.run import Trace, trace
from ooc_influence.tracing.settings import RUN, read_settings

__all__ = ["RUN", "Trace", "read_settings", "trace"]
