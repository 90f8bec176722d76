#!/usr/bin/env bash
# Makes .venv with everything the test suite needs (see tools/setup_env.sh) and runs the suite with pytest.
#
#   bash tools/test.sh                          the whole suite, a test file on each core and one more
#   bash tools/test.sh --fast                   about 2 minutes: what starts no processes, and one parity row of each kind
#   bash tools/test.sh --whole-parity           the whole suite, with 20 steps in every row of the parity tables
#   bash tools/test.sh tests/pipeline -k 1f1b   other arguments are pytest's, and all tests run in one process
#   bash tools/test.sh -m slow                  the tests that are left out by default because they take minutes
#
#   TORCH_VERSION=2.11.0 bash tools/test.sh     the whole suite with another torch, in an environment of its own
#
# Needs Python 3.11 or 3.12 and a package index; no GPU. Environment: PYTHON picks the interpreter, TORCH_INDEX_URL the
# index of torch: with CPU-only wheels, which PyTorch publishes at https://download.pytorch.org/whl/cpu, the download
# is 200 MB instead of 3 GB. The exit code is pytest's.
set -euo pipefail
unset OMP_NUM_THREADS OMP_THREAD_LIMIT  # nproc would take them for the number of cores; tests set threads themselves
unset PYTHONDONTWRITEBYTECODE  # else every process that a test starts compiles the project again
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh test
case "$*" in
    # A file stays with one worker, which keeps its fixtures; the order is that of tests/conftest.py. One more worker
    # than cores, since tests of whole runs mostly wait.
    "" | --fast | --whole-parity) set -- -n "$(($(nproc) + 1))" --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@" ;;
esac
exec ".venv${TORCH_VERSION:+-torch-$TORCH_VERSION}/bin/python" -m pytest "$@"
