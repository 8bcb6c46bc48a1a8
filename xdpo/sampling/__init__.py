"""Image i of a prompt set from seed s is one definite image; and the folders and sheets that images go to."""

from xdpo.sampling.folder import (
    ImageFolderError,
    check_image_folder,
    collect_manifest,
    open_image_folder,
    read_manifest,
    record,
    save_image,
)
from xdpo.sampling.images import (
    SCHEDULERS,
    ImageTask,
    NotFiniteError,
    SamplingSettings,
    is_truncated,
    plan_chunks,
    prepare_pipeline,
    sample_chunk,
    sample_images,
)
from xdpo.sampling.sheets import contact_sheet, save_sheet

__all__ = [
    "SCHEDULERS",
    "ImageFolderError",
    "ImageTask",
    "NotFiniteError",
    "SamplingSettings",
    "check_image_folder",
    "collect_manifest",
    "contact_sheet",
    "is_truncated",
    "open_image_folder",
    "plan_chunks",
    "prepare_pipeline",
    "read_manifest",
    "record",
    "sample_chunk",
    "sample_images",
    "save_image",
    "save_sheet",
]
