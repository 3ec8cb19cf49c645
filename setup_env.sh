#!/usr/bin/env bash
# Finds or makes the Python environment. To be sourced: `setup_env FILE...` sets PYTHON to the active `python` if it
# satisfies these requirement files, else to the one in .venv, which is made with uv where that is installed, else with
# venv and pip. `bash setup_env.sh` makes it beforehand. .venv counts once it holds the file .complete, written last;
# .venv-lock is a link to nothing whose text names the process that makes it.
# A PyTorch that satisfies them is never replaced: one of the active Python is used from .venv, too.

ENV_ROOT=$(unset CDPATH && cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENV_DIR=$ENV_ROOT/.venv
# Prints the requirements that are not met. It asks for versions alone, since importing takes seconds, and takes
# 2.6.0a0 of a vendor's build for 2.6.
ENV_CHECK='
import sys
from importlib.metadata import PackageNotFoundError, version
from packaging.requirements import Requirement
from packaging.version import Version
for line in filter(None, (line.split("#")[0].strip() for path in sys.argv[1:] for line in open(path))):
    needed = Requirement(line)
    try:
        is_met = Version(version(needed.name)).base_version in needed.specifier
    except PackageNotFoundError:
        is_met = False
    if not is_met:
        print(line)
'

_env_lacks() { # PYTHON FILE...: prints what it lacks, which is all of it where it cannot tell
  (cd "$ENV_ROOT" && { "$1" -c "$ENV_CHECK" "${@:2}" 2>/dev/null || grep -hv '^#' "${@:2}"; })
}

_env_is_ready() { [[ -f $ENV_DIR/.complete && -z $(_env_lacks "$ENV_DIR/bin/python" "$@") ]]; } # FILE...

_env_say() { printf 'setup_env.sh: %s\n' "$*" >&2; }

_env_end() { _env_say "${@:2}" && exit "$1"; } # STATUS MESSAGE...

_env_lock() { # waits while another process makes .venv; the lock of a dead one is removed
  local me="${HOSTNAME:-}:$$" owner
  [[ -w $ENV_ROOT ]] || _env_end 2 "error: cannot make .venv in $ENV_ROOT; use a copy of the repository that you own"
  owner=$(readlink "$ENV_DIR-lock") && _env_say "waiting for $owner to make .venv (if it is gone, remove $ENV_DIR-lock)"
  # Ours if it still is after a second: by then others have removed what they found of a dead process.
  until ln -s "$me" "$ENV_DIR-lock" 2>/dev/null && sleep 1 && [[ $(readlink "$ENV_DIR-lock") == "$me" ]]; do
    owner=$(readlink "$ENV_DIR-lock") || continue
    if [[ ${owner%:*} == "${HOSTNAME:-}" ]] && ! kill -0 "${owner##*:}" 2>/dev/null; then rm -f "$ENV_DIR-lock"; fi
    sleep 1
  done
}

_env_unlock() { # also where it ends early: an environment is left whole or not at all
  [[ -f $ENV_DIR/.complete ]] || rm -rf "$ENV_DIR"
  rm -rf "$ENV_DIR/.tmp" "$ENV_DIR-lock"
}

_env_run() { # COMMAND...: in the background, since bash would hold back a signal until a foreground command ends
  "$@" &
  wait "$!" || _env_end 1 "error: that failed, see above; the same command tries again"
}

_env_create() { # FILE...: makes .venv, empty or with a view of the packages of an active Python whose PyTorch fits
  local base lender='' create=(uv venv --no-project --python '>=3.11') torch
  torch=$(cd "$ENV_ROOT" && grep -h '^torch[>=]' "$@" || true)
  for base in python python3 python3.14 python3.13 python3.12 python3.11 ''; do
    "$base" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if [[ -n $torch && -z $(_env_lacks "$base" <(echo "$torch")) ]]; then lender=$base; fi
    break
  done
  if [[ -n $lender ]] || ! command -v uv >/dev/null; then
    [[ -n $base ]] || _env_end 2 "error: needs uv, or Python >= 3.11 with its venv (apt install python3-venv)"
    create=("$base" -m venv)
  fi
  _env_say "making .venv with ${create[0]}, once${lender:+, upon its PyTorch}: up to 3 GB to download and 6 GB on disk;" \
    "Ctrl-C stops it"
  _env_run "${create[@]}" "$ENV_DIR"
  if [[ -n $lender ]]; then
    "$lender" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
      >"$(echo "$ENV_DIR"/lib/python*/site-packages)/lender.pth"
  fi
}

_env_make() { # FILE...: makes .venv, or adds to it
  local install=(uv pip install --python "$ENV_DIR") temporary=$ENV_DIR/.tmp
  [[ -f $ENV_DIR/.complete ]] || rm -rf "$ENV_DIR"
  [[ -d $ENV_DIR ]] || _env_create "$@"
  [[ ! -x $ENV_DIR/bin/pip ]] || install=(env PIP_USER=0 "$ENV_DIR/bin/python" -m pip --require-virtualenv install)
  mkdir "$temporary" # pip, when it is ended, leaves the gigabytes that it was unpacking
  _env_lacks "$ENV_DIR/bin/python" "$@" >"$temporary/lacks.txt"
  "$ENV_DIR/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' \
    >"$temporary/torch.txt" 2>/dev/null || true # what depends on PyTorch has to fit the one that is there
  TMPDIR=$temporary _env_run "${install[@]}" -c "$temporary/torch.txt" -r "$temporary/lacks.txt"
  touch "$ENV_DIR/.complete"
}

_env_stop() { # NAME of the signal: ends what runs in the background, then the script with the status of a shell
  # shellcheck disable=SC2046 # several
  { kill $(jobs -p) && wait; } 2>/dev/null || true
  _env_end $((128 + $(kill -l "$1"))) interrupted
}

setup_env() { # FILE...: sets PYTHON; ends the script where that is impossible
  local answer lacks='' name
  for PYTHON in python python3; do
    if [[ $(command -v "$PYTHON") == "$ENV_DIR"/* ]]; then continue; fi
    answer=$(_env_lacks "$PYTHON" "$@")
    if [[ -z $answer ]]; then return; fi
    if [[ -z $lacks ]] || ((${#answer} < ${#lacks})); then lacks=$answer; fi
  done
  PYTHON=$ENV_DIR/bin/python
  if ! _env_is_ready "$@"; then
    _env_say "the active Python is not used: it lacks ${lacks//$'\n'/, }"
    _env_lock
    trap _env_unlock EXIT
    for name in INT TERM HUP; do
      # shellcheck disable=SC2064 # the name of now
      trap "_env_stop $name" "$name"
    done
    _env_is_ready "$@" || _env_make "$@" # another start may have made it meanwhile
    trap - EXIT INT TERM HUP
    _env_unlock
  fi
  export VIRTUAL_ENV=$ENV_DIR PATH=$ENV_DIR/bin:$PATH
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  setup_env "${@:-requirements.txt}"
  echo "$PYTHON has everything"
fi
