"""The user study (paper, §5.3): blind pairs of images on a page, votes that are never lost, counts in a table."""
