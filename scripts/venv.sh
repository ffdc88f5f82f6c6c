# Sourced by test.sh and demo.sh: makes .venv, installs the project into it, and activates it.
#
#   use_venv          the project with its run-time dependencies
#   use_venv plot     the same with what the plotting scripts need
#   use_venv dev      the same with all development tools
#
# A finished installation leaves a stamp, so that later runs start at once until pyproject.toml changes.

supported() {
    command -v "$1" >/dev/null && "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'
}

make_venv() {
    local python
    # The newest first: newer releases of jax come for newer Pythons only.
    for python in python3.14 python3.13 python3.12 python3.11 python3; do
        # One that is there may lack its venv module, or be a shim for a version that is not installed.
        supported "$python" 2>/dev/null || continue
        if ! "$python" -m venv --clear .venv; then
            echo "error: $python cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2
            return 1
        fi
        return
    done
    echo "error: Python 3.11 to 3.14 is needed, and none of python3.14, python3.13, python3.12, python3.11 and python3" >&2
    echo "       is one; install python3.13 with its venv module, then run this again" >&2
    return 1
}

use_venv() {
    local extra="${1:-}" hash
    hash="$(git hash-object pyproject.toml)"
    if [[ ! -e ".venv/stamp-dev-$hash" && ! -e ".venv/stamp-${extra:-run}-$hash" ]]; then
        if ! supported .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null; then
            make_venv
        fi
        echo "installing omni_jax${extra:+[$extra]} into .venv (once)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}"
        rm -f .venv/stamp-*
        touch ".venv/stamp-${extra:-run}-$hash"
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
}
