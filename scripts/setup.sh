# Sourced by the other scripts, from the repository's root: a virtual environment in .venv with the pinned requirements
# and this clone's package, made on first use and again only when requirements.txt changes. Sets PYTHON, and PYTHONPATH,
# by which this clone's package is the one imported also after the clone was moved, or where .venv is another clone's.
PYTHON="$PWD/.venv/bin/python"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

make_environment() {
    local base="${XDPO_PYTHON:-python3}" stamp=.venv/installed-requirements
    if cmp -s requirements.txt "$stamp"; then return; fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed, got $("$base" --version 2>&1); set XDPO_PYTHON to one" >&2
        return 1
    fi
    if ! "$base" -m venv .venv; then
        echo "error: could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
        return 1
    fi
    echo "installing requirements.txt into .venv (once; PyTorch is a large download where it comes with CUDA) …"
    # torch first: with it in place no other package's resolver picks another build.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)" &&
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt -e . || {
        echo "error: installing failed; see above, then run the same command again" >&2
        return 1
    }
    cp requirements.txt "$stamp"
}

make_environment || return 1  # ends a script with set -e, and not the shell of somebody who sources this
