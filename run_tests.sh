#!/usr/bin/env bash
# Runs the tests, after installing what they need. Arguments go to pytest: bash run_tests.sh tests/test_run_all.py -x
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")"

source ./setup_env.sh
setup_env requirements.txt requirements-dev.txt
exec "$PYTHON" -m pytest "$@"
