"""The user study (paper, §5.3): blind pairs of images on a page, durable votes, and their analysis."""
