#!/usr/bin/env bash
# Makes .venv in the repository and installs the pinned dependencies and this project into it.
#
#   bash tools/setup_env.sh run     what every command of the README needs: training, fine-tuning, ONNX files, serving
#   bash tools/setup_env.sh test    the same and what the test suite needs
#
# Running it again costs a fraction of a second as long as nothing it depends on has changed: a stamp in .venv keeps a
# hash of constraints.txt, pyproject.toml, setup.py and this file.
#
# Environment:
#   PYTHON            the interpreter that makes .venv; default: the first of python3, python3.12, python3.11 that is
#                     Python 3.11 or 3.12 and has the venv module.
#   TORCH_INDEX_URL   the package index that torch comes from; default: the index pip is configured with, whose Linux
#                     wheels carry CUDA (about 3 GB with the libraries they need). PyTorch publishes much smaller
#                     CPU-only wheels (200 MB) at https://download.pytorch.org/whl/cpu. Everything else always comes
#                     from the ordinary index.
#   TORCH_VERSION     another torch than the pinned one, such as 2.11.0, with the Triton that its wheels require; the
#                     environment is then .venv-torch-2.11.0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'tools/setup_env.sh: %s\n' "$1" >&2
    exit 1
}

pinned() {
    sed -n "s/^$1==//p" constraints.txt
}

what=${1:-run}
venv=.venv${TORCH_VERSION:+-torch-$TORCH_VERSION}
case ${TORCH_VERSION:-} in  # the Triton that torch's CUDA wheels require, which its CPU wheels leave out
    "") triton="" ;;
    2.11.[0-9]*) triton=3.6.0 numpy=2.3.5 setuptools=81.0.0 ;;
    2.12.[0-9]* | 2.13.[0-9]*) triton=3.7.1 numpy=$(pinned numpy) setuptools=$(pinned setuptools) ;;
    *) fail "TORCH_VERSION=$TORCH_VERSION is not supported; name a whole version from 2.11.0 to 2.13, such as 2.11.0" ;;
esac
case $what in
    run) extras="[glue,onnx,serve]" ;;
    test) extras="[test]" ;;
    *) fail "'$what' is not a set-up; use 'run' or 'test'" ;;
esac

find_python() {
    local candidate reasons=""
    for candidate in ${PYTHON:-python3 python3.12 python3.11}; do
        if ! "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            reasons+="  $candidate: $("$candidate" --version 2>&1 | head -n 1 || true); not Python 3.11 or 3.12"$'\n'
        elif ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            reasons+="  $candidate: has no venv module; on Debian and Ubuntu: apt-get install $(basename "$candidate")-venv"$'\n'
        else
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no usable Python was found; install Python 3.11 or 3.12, or name one with PYTHON=/path/to/python3.12. Tried:
$reasons"
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    printf 'Making %s with %s\n' "$venv" "$("$python" --version)"
    "$python" -m venv "$venv" || fail "'$python -m venv $venv' failed; delete $venv and see the message above"
fi
"$venv/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
    fail "$venv holds $("$venv/bin/python" --version 2>&1), which is not Python 3.11 or 3.12; delete $venv and run this again"

wanted=$({ printf '%s\n' "${TORCH_VERSION:-}"; cat constraints.txt pyproject.toml setup.py tools/setup_env.sh; pwd; } | sha256sum)
for done in "$what" test; do
    [ "$(cat "$venv/megatron3d-$done.sha256" 2>/dev/null)" != "$wanted" ] || exit 0
done
stamp=$venv/megatron3d-$what.sha256
rm -f "$stamp"

constraints=constraints.txt
if [ -n "$triton" ]; then
    constraints=$venv/constraints.txt
    # torch 2.11 needs an older setuptools than the pinned one, and the interpreter of its Triton an older NumPy.
    sed -E -e "s/^torch==.*/torch==$TORCH_VERSION/" -e "s/^triton==.*/triton==$triton/" \
        -e "s/^setuptools==.*/setuptools==$setuptools/" -e "s/^numpy==.*/numpy==$numpy/" constraints.txt >"$constraints"
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check)
# One line for each package as it comes, or minutes would pass without a sign of life; pip's errors are left alone.
with_progress() {
    "$@" | sed -u -n -E -e 's/^Installing collected packages:.*/Unpacking all of them/' \
        -e 's/^ *((Downloading|Using cached|Processing|Building wheel|Unpacking) .{1,90}).*/  \1/p'
}
printf 'Installing the pinned dependencies into %s (once; minutes on a slow connection)\n' "$venv"
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    # Its own dependencies follow from the ordinary index in the next step.
    with_progress "${pip[@]}" install --progress-bar off --no-deps --index-url "$TORCH_INDEX_URL" -c "$constraints" torch ||
        fail "torch could not be installed from TORCH_INDEX_URL=$TORCH_INDEX_URL; check that address or unset it"
elif ! command -v nvidia-smi >/dev/null; then
    printf 'No GPU is seen here: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu makes this download far smaller\n'
fi
with_progress "${pip[@]}" install --progress-bar off -c "$constraints" -e ".$extras" ||
    fail "the installation failed; the message above says which package. A package index must be reachable"

if [ "$what" = test ]; then
    # Some tests compare with Megatron-LM's own core; without its dependencies, of which those tests need none.
    "${pip[@]}" install --quiet --no-deps -c "$constraints" megatron-core ||
        printf 'megatron-core could not be installed: the tests that compare with it skip by name, all others run\n'
fi
printf '%s' "$wanted" >"$stamp"
