"""A hook of mkdocs: on the site, what the pages link outside docs/ leads to the repository.

The environment variable REPOSITORY_URL says where that is, such as https://github.com/OWNER/NAME. Without it such links
become plain text.
"""

import os
import re
from typing import Any

_OUTSIDE = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with each page's text; returns it with other links."""
    repository = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    to = rf"[\1]({repository}/blob/HEAD/\2)" if repository else r"\1"
    return _OUTSIDE.sub(to, markdown)
