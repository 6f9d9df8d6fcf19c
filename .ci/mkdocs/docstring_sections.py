"""Docstrings say `Example:`, as most people write it; Griffe's parser wants the plural."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class SingularExample(Extension):
    """Lets a section `Example:` be read as examples, with its prompts, and not as a remark."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
