"""Text that comes from elsewhere and is printed."""

from __future__ import annotations

import re

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # what a terminal would act on
