"""What a result says about the code that made it."""

import platform

from xdpo.provenance import git_commit, library_versions


def test_the_commit_is_a_hash_or_absent():
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_versions_name_python_and_the_libraries_that_decide_a_result():
    versions = library_versions()
    assert versions["python"] == platform.python_version()
    assert {"torch", "diffusers", "transformers", "numpy"} <= versions.keys()
