"""Images as data URIs up to a budget: small ones unchanged, large ones as thumbnails."""

import base64
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

SIDE = 256  # pixels of a thumbnail's longer side
_AS_IT_IS_BYTES = 64_000
_TYPES = {b"\x89PNG\r\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}  # by how such a file begins


def embed(paths: Iterable[Path], budget_bytes: int) -> dict[Path, str]:
    """Data URIs of the images in the given order, until they would exceed the budget."""
    embedded: dict[Path, str] = {}
    distinct = iter(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:  # decoding and encoding release the interpreter's lock
        while some := list(islice(distinct, 64)):
            for path, uri in zip(some, pool.map(data_uri, some), strict=True):
                budget_bytes -= len(uri)
                if budget_bytes < 0:
                    return embedded
                embedded[path] = uri
    return embedded


def data_uri(path: Path) -> str:
    """The data URI of an image: unchanged if it is small and a PNG or JPEG, else as a WebP thumbnail."""
    from PIL import Image

    from xdpo.data.images import decode_rgb

    content = path.read_bytes()
    image = decode_rgb(content)
    media_type = next((name for start, name in _TYPES.items() if content.startswith(start)), None)
    if max(image.size) <= SIDE and media_type is not None and len(content) <= _AS_IT_IS_BYTES:
        return _uri(media_type, content)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return _uri("image/webp", buffer.getvalue())


def _uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
