#!/usr/bin/env bash
# Finds or makes the Python environment. To be sourced: `setup_env FILE...` then sets PYTHON to a Python that has
# everything in these requirement files (paths from the repository's folder) and puts it first on the PATH. That is
# the `python` on the PATH if it satisfies them, else the one in .venv, which is made when it is missing or no longer
# satisfies them. `bash setup_env.sh` alone makes the environment beforehand.
#
# .venv counts from the moment that it holds the file .complete, written last. What an interruption or a failure
# leaves is removed, by the next start if need be. Two starts at once build it once: .venv.lock names the builder.

ENV_ROOT=$(unset CDPATH && cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ENV_DIR=$ENV_ROOT/.venv
ENV_LOCK=$ENV_ROOT/.venv.lock

# Exit status 0: every requirement is satisfied. 3: some are not, and the output names them. It reads the lines
# `name>=version` and asks for the installed version, without importing the package: importing PyTorch takes seconds.
ENV_CHECK='
import re, sys
if sys.version_info < (3, 11):
    print("Python >= 3.11 (is %d.%d)" % sys.version_info[:2])
    sys.exit(3)
from importlib.metadata import PackageNotFoundError, version

def release(text):
    numbers = [int(n) for n in re.match(r"[0-9.]*", text).group().split(".") if n]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers

lacking = []
for path in sys.argv[1:]:
    for line in open(path):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, least = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", line).groups()
        try:
            found = version(name)
        except PackageNotFoundError:
            lacking.append(line)
            continue
        if release(found) < release(least):
            lacking.append("%s (has %s)" % (line, found))
print(", ".join(lacking))
sys.exit(3 if lacking else 0)
'

_env_say() {
  printf 'setup_env.sh: %s\n' "$*" >&2
}

_env_satisfies() { # PYTHON FILE...: prints what is lacking
  local python=$1
  shift
  (cd "$ENV_ROOT" && "$python" -c "$ENV_CHECK" "$@") 2>&1
}

_env_is_ready() { # FILE...
  [[ -f $ENV_DIR/.complete ]] && _env_satisfies "$ENV_DIR/bin/python" "$@" >/dev/null
}

_env_find_base() { # sets ENV_BASE to a Python >= 3.11 that can make environments, and ENV_FOUND to what it saw instead
  local name path answer
  ENV_BASE='' ENV_FOUND=''
  for name in python python3 python3.14 python3.13 python3.12 python3.11; do
    while IFS= read -r path; do
      if [[ -z $path || $path == "$ENV_DIR"/* ]]; then continue; fi
      answer=$("$path" -c 'import sys
if sys.version_info < (3, 11): sys.exit("is Python %d.%d" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("lacks the module %s" % error.name)' 2>&1) && ENV_BASE=$path && return
      ENV_FOUND+="; $path ${answer##*$'\n'}"
    done <<<"$(type -aP "$name" || true)"
  done
}

_env_is_alive() { # HOST PID: also true where this machine cannot know
  [[ $1 != "${HOSTNAME:-}" ]] || kill -0 "$2" 2>/dev/null
}

# The lock is a folder, which only one process can make. It holds the host and the process that builds. Where that
# process is gone, one of those who wait takes the lock over: the one that can make the folder `heir` in it.
_env_lock() {
  local host pid waited=0
  until mkdir "$ENV_LOCK" 2>/dev/null; do
    if [[ ! -d $ENV_LOCK ]]; then
      if [[ -w $ENV_ROOT ]]; then continue; fi # it was given back just now
      _env_say "error: cannot write in $ENV_ROOT to make .venv; use a copy of the repository that you own"
      return 2
    fi
    host='' pid=''
    read -r host pid 2>/dev/null <"$ENV_LOCK/builder" || true
    if { [[ -n $pid ]] && ! _env_is_alive "$host" "$pid"; } || { [[ -z $pid ]] && ((waited > 10)); }; then
      if mkdir "$ENV_LOCK/heir" 2>/dev/null; then
        if [[ "$host $pid" == "$(cat "$ENV_LOCK/builder" 2>/dev/null || echo ' ')" ]]; then
          _env_note_builder "$$"
          rmdir "$ENV_LOCK/heir"
          return
        fi
        rmdir "$ENV_LOCK/heir"
      fi
    fi
    if ((waited == 2)); then
      _env_say "process ${pid:-?} on ${host:-?} is making .venv; waiting for it (if there is none, remove $ENV_LOCK)"
    fi
    sleep 1
    waited=$((waited + 1))
  done
  _env_note_builder "$$"
}

_env_note_builder() { # PID
  printf '%s %s\n' "${HOSTNAME:-}" "$1" >"$ENV_LOCK/builder.partial"
  mv "$ENV_LOCK/builder.partial" "$ENV_LOCK/builder"
}

# Runs as a process of its own, which finishes even if the script that started it is killed, and is then waited for
# by the next start. Nothing may be removed while a Python still runs in .venv: one that finds no pyvenv.cfg when it
# starts takes itself for the Python that made .venv, and pip would install there.
_env_build() { # extend|make FILE...
  local way=$1 file status=0 options=()
  shift
  for file in "$@"; do options+=(-r "$ENV_ROOT/$file"); done
  ENV_PIP='' ENV_STOPPED=''
  trap _env_stop TERM
  if [[ $way == make ]]; then
    { rm -rf "$ENV_DIR" && "$ENV_BASE" -m venv "$ENV_DIR"; } || status=$?
  fi
  if ((status == 0)) && [[ -z $ENV_STOPPED ]]; then
    # pip, when it is ended, leaves the gigabytes that it was unpacking: here they go with the rest. Where a user's
    # configuration asks for --user, pip would refuse to install in an environment.
    mkdir -p "$ENV_DIR/.tmp"
    PIP_USER=0 TMPDIR=$ENV_DIR/.tmp "$ENV_DIR/bin/python" -m pip --require-virtualenv install "${options[@]}" &
    ENV_PIP=$!
    if [[ -n $ENV_STOPPED ]]; then _env_stop; fi
    wait "$ENV_PIP" || status=$?
    while [[ -n $ENV_STOPPED ]] && kill -0 "$ENV_PIP" 2>/dev/null; do
      wait "$ENV_PIP" || true
    done
    rm -rf "$ENV_DIR/.tmp"
  fi
  if [[ -n $ENV_STOPPED ]]; then status=143; fi
  if ((status == 0)); then
    touch "$ENV_DIR/.complete"
  elif [[ $way == make ]]; then
    rm -rf "$ENV_DIR"
  fi
  rm -rf "$ENV_LOCK"
  exit "$status"
}

_env_stop() {
  ENV_STOPPED=1
  if [[ -n $ENV_PIP ]]; then kill -TERM "$ENV_PIP" 2>/dev/null || true; fi
}

_env_make() { # FILE...: builds .venv, or adds to it when only files after the first are not satisfied
  local way=make builder status=0 size="about 0.5 GB to download, 2 GB on disk"
  if [[ $(uname -s) == Linux ]]; then size="about 3 GB to download, 6 GB on disk"; fi
  if _env_is_ready "$1"; then
    way=extend
    _env_say "adding to .venv what $* ask for"
  else
    _env_find_base
    if [[ -z $ENV_BASE ]]; then
      _env_say "error: found no Python >= 3.11 that can make environments (${ENV_FOUND#; }); install one, with its" \
        "venv module (Debian: apt install python3 python3-venv), or activate an environment that has requirements.txt"
      rm -rf "$ENV_LOCK"
      return 2
    fi
    _env_say "making .venv with $ENV_BASE, once: $size; Ctrl-C stops it"
  fi
  ENV_INTERRUPTED=''
  _env_build "$way" "$@" &
  builder=$!
  trap 'ENV_INTERRUPTED=1; kill -TERM "$builder" 2>/dev/null || true' INT TERM HUP
  _env_note_builder "$builder"
  wait "$builder" || status=$?
  while [[ -n $ENV_INTERRUPTED ]] && kill -0 "$builder" 2>/dev/null; do
    wait "$builder" || true
  done
  trap - INT TERM HUP
  if [[ -n $ENV_INTERRUPTED ]]; then
    _env_say "interrupted; the same command starts it again"
    return 130
  fi
  if ((status != 0)); then
    _env_say "error: installing failed, see above; no half-made environment was left, and the same command tries again"
    return 1
  fi
}

setup_env() { # FILE...: sets PYTHON; ends the script where that is impossible
  local candidate path lacking said='' status
  for candidate in python python3; do
    path=$(command -v "$candidate") || continue
    if [[ $path == "$ENV_DIR"/* ]]; then continue; fi
    status=0
    lacking=$(_env_satisfies "$candidate" "$@") || status=$?
    if ((status == 0)); then
      PYTHON=$candidate
      return
    fi
    if ! _env_is_ready "$@"; then
      if ((status != 3)); then lacking="all, since it does not run"; fi
      if [[ $lacking != "$said" ]]; then _env_say "$path lacks $lacking"; fi
      said=$lacking
    fi
  done
  if ! _env_is_ready "$@"; then
    _env_lock || exit $?
    # Another start may have made it while this one waited.
    if _env_is_ready "$@"; then rm -rf "$ENV_LOCK"; else _env_make "$@" || exit $?; fi
  fi
  PYTHON=$ENV_DIR/bin/python
  export VIRTUAL_ENV=$ENV_DIR PATH=$ENV_DIR/bin:$PATH
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  if (($# > 0)); then setup_env "$@"; else setup_env requirements.txt; fi
  echo "$PYTHON has everything"
fi
