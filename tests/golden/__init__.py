"""This code against golden tensor files: `python -m tests.golden FILE...`.

Settings come from a file's metadata, widths, layers and channels from the shapes of its weights, so that
files of other sizes and variants work unchanged. What a file lacks is not checked; what it holds beyond what
is known here is named.
"""

from tests.golden.check import Report, check
from tests.golden.file import Golden, Row

__all__ = ["Golden", "Report", "Row", "check"]
