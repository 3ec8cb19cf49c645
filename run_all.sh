#!/usr/bin/env bash
# Trains a diffusion transformer and samples from it, with one command; `bash run_all.sh -h` explains it.
# What is decided and checked is in runtime/pipeline.py and in the commands; here are the stages and signals.
set -euo pipefail
unset CDPATH # with it, cd could go elsewhere

{ : 3>&1; } 2>/dev/null || exec >/dev/null # it is closed, which must not end a run
: 3>&2 || exec 2>/dev/null
START_DIR=$(pwd -P)
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

usage() {
  cat <<'USAGE'
Usage: bash run_all.sh [USE_ROPE] [ROTATE] [THETA] [FREQS_FOR] [MAX_FREQ] [TRUNCATE_PERCENTAGE]
                       [MAX_FREQ_LANG] [MIN_FREQ_LANG] [SAME_THETA] [SEED] [MODEL]

Trains a class-conditional diffusion transformer on latents that are encoded beforehand, and samples from it. With
DATA_PATH=/path/to/ImageNet/train it runs the published recipe; without, a demo on handwritten digits, of which a
classifier measures the samples. Everything is checked before it starts; the same command goes on after an interruption.

      argument             default   meaning; - or nothing keeps the default
   1  USE_ROPE             True      True: rotary position encoding; False: fixed sin-cos, as in DiT
   2  ROTATE               0         Spiral RoPE with K = 2*ROTATE directions; 0: axial RoPE
   3  THETA                10000     base of the geometric frequencies
   4  FREQS_FOR            lang      lang: geometric frequencies; pixel: evenly spaced
   5  MAX_FREQ             10        pixel: the highest frequency is MAX_FREQ / 2 * pi
   6  TRUNCATE_PERCENTAGE  0.0       share of the frequencies set to 0, from 0 to 1
   7  MAX_FREQ_LANG        1.5       lang: highest frequency, radians per patch
   8  MIN_FREQ_LANG        0.0       lang: lowest frequency, radians per patch; 0: as THETA gives it
   9  SAME_THETA           False     True: every direction has the same frequencies
  10  SEED                 0         of weights, data order and noise
  11  MODEL                DiT-B/4   DiT- XL, L, B, S or XS, / patch size 2, 4 or 8 (the demo: DiT-XS/2)

  bash run_all.sh False                      the DiT baseline
  bash run_all.sh - - - - - - - - - 123      another seed
  EPOCHS=160 DATA_PATH=/path/to/ImageNet/train bash run_all.sh - 4 - - - - - - - - DiT-B/2

Every option of train.py and sample_ddp.py (--help lists them) is an environment variable too: EPOCHS=160 is --epochs
160, COMPILE=True is --compile. TRAIN_ARGS="--val-fraction 0.01 --use-wandb", CACHE_ARGS, SAMPLE_ARGS and EVALUATE_ARGS
reach any option of their stage, and win. Besides there are, as docs/training.md explains, DATA_PATH, RECIPE,
RESULTS_BASE, LATENTS_DIR, CACHE_LATENTS, SAMPLE_SEED, SAMPLE_VAE, SAMPLING_STEPS, NPROC_PER_NODE; NNODES, NODE_RANK,
MASTER_ADDR and MASTER_PORT for several machines; FID_REFERENCE, FID_METRICS and INCEPTION_WEIGHTS, which measure FID.
Relative paths are taken from the folder in which you run the command.
USAGE
}

say() { # FORMAT VALUE...: where nobody can read it any more, the run goes on
  # shellcheck disable=SC2059 # the format is the caller's
  printf "$@" 2>/dev/null || true
}

make_plan() { # ARGUMENT...: asks runtime/pipeline.py; sets what it names, and the arguments of each stage
  local name value status=1
  CACHE=() TRAIN=() SAMPLE=() EVALUATE=()
  while IFS= read -r -d '' name && IFS= read -r -d '' value; do
    case $name in
      cache) CACHE+=("$value") ;;
      train) TRAIN+=("$value") ;;
      sample) SAMPLE+=("$value") ;;
      evaluate) EVALUATE+=("$value") ;;
      child) follow "$value" ;;
      status) status=$value ;;
      *) printf -v "$name" '%s' "$value" ;;
    esac
  done < <(
    "$PYTHON" -m runtime.pipeline "$START_DIR" "$@" &
    printf 'child\0%s\0' "$!"
    wait "$!" && status=0 || status=$?
    printf 'status\0%s\0' "$status"
  )
  CHILD=''
  if [[ -n $STOPPED ]]; then end_at "the checks" "$status"; fi
  if ((status == 2)); then exit 2; fi # it has said why
  if ((status != 0)); then end_at "the checks" "$status"; fi
}

choose_launchers() { # sets LAUNCH for all machines, and LAUNCH_HERE for this one alone
  # The workers get time to write a checkpoint before torchrun, told to stop, ends them.
  local torchrun=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC_PER_NODE"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 600)
  LAUNCH_HERE=("$PYTHON")
  if ((NPROC_PER_NODE > 1)); then LAUNCH_HERE=("${torchrun[@]}" --standalone --local-addr 127.0.0.1); fi
  LAUNCH=("${LAUNCH_HERE[@]}")
  if ((NNODES > 1)); then
    LAUNCH=("${torchrun[@]}" --nnodes "$NNODES" --node_rank "$NODE_RANK"
      --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  fi
}

# Told to stop, this script passes it on to the stage that runs and ends after it. Ctrl-C reaches the stage as
# well, but a background process of a script ignores SIGINT unless it asks for it, so each signal goes on as SIGTERM.
STOPPED=''
CHILD=''
on_signal() { # NAME
  STOPPED=${STOPPED:-$1}
  if [[ -n $CHILD ]]; then kill -TERM "$CHILD" 2>/dev/null || true; fi
}

follow() { # PROCESS: signals go on to it from now on, and one that came before
  CHILD=$1
  if [[ -n $STOPPED ]]; then on_signal "$STOPPED"; fi
}

end_at() { # STAGE STATUS: ends this script with work left, and says how to go on
  if [[ -n $STOPPED ]]; then
    say '\nrun_all.sh: stopped during %s; run the same command again to go on from there\n' "$1"
    exit $((128 + $(kill -l "$STOPPED")))
  fi
  local how="failed with status $2; see its message above"
  if (($2 > 128)); then how="was ended by signal $(($2 - 128))"; fi
  say '\nrun_all.sh: %s %s. Run again, it goes on from there.\n' "$1" "$how" >&2
  exit "$2"
}

run_stage() { # STAGE COMMAND...: shows the command and runs it to its end
  local stage=$1 status=0
  shift
  if [[ -n $STOPPED ]]; then end_at "$stage" 1; fi
  say '\n%s\n ' "$stage"
  say ' %q' "$@"
  say '\n'
  # In the background with wait, since bash would hold back a signal until a foreground command ends.
  "$@" &
  follow $!
  wait "$CHILD" || status=$?
  while [[ -n $STOPPED ]] && kill -0 "$CHILD" 2>/dev/null; do # the signal ended `wait`, not the stage
    status=0
    wait "$CHILD" || status=$?
  done
  CHILD=''
  if ((status != 0)); then end_at "$stage" "$status"; fi
}

run_on_all() { # STAGE COMMAND...: as run_stage, when all machines have come so far; torchrun would not say who has not
  if ((NNODES > 1)); then
    run_stage "Meeting of $NNODES machines, of which this is number $NODE_RANK" \
      "$PYTHON" -m runtime.distributed "$NNODES" "$NODE_RANK" "$MASTER_ADDR" "$MASTER_PORT"
  fi
  run_stage "$1" "${LAUNCH[@]}" "${@:2}"
}

appears() { # FILE: a shared file system may show another machine's file only after a while
  local seconds
  for ((seconds = 0; NNODES > 1 && seconds < 60; seconds++)); do
    if [[ -e $1 || -n $STOPPED ]]; then break; fi
    sleep 1
  done
  [[ -e $1 ]]
}

run_stages() { # sets NPZ
  local training="Stage 1 (training)" sampling="Stage 2 (sampling)" evaluation="Stage 3 (evaluation)"
  if [[ -n $DIGITS && ! -d $DIGITS ]]; then # the folder appears when it is whole
    run_stage "Data (the digits as a folder of images)" "$PYTHON" -m demo.digits "$DIGITS"
  fi
  if ((${#CACHE[@]} > 0)); then run_on_all "Stage 0 (latents)" cache_latents.py "${CACHE[@]}"; fi
  run_on_all "$training" train.py "${TRAIN[@]}"
  appears "$RUN_DIR/finished.json" || end_at "$training" 1

  NPZ=$("$PYTHON" sample_ddp.py "${SAMPLE[@]}" --print-name) || end_at "$sampling" $?
  run_on_all "$sampling" sample_ddp.py "${SAMPLE[@]}"
  appears "$NPZ" || end_at "$sampling" 1

  if ((NODE_RANK > 0)); then return; fi # machine 0 measures for all
  if [[ -n $DIGITS ]]; then run_stage "$evaluation" "$PYTHON" -m demo.measure --samples "$NPZ"; fi
  if ((${#EVALUATE[@]} > 0)); then
    run_stage "$evaluation" "${LAUNCH_HERE[@]}" evaluate.py "${EVALUATE[@]}" --samples "$NPZ"
  fi
  run_stage "Report (the run's page)" "$PYTHON" -m runtime.report "$RUN_DIR"
}

print_results() { # the folder once, then what lies in it
  local file
  say '\nFinished. Results in %s:\n' "$RUN_DIR"
  for file in "$RUN_DIR"/{checkpoints,loss.png,report.html} "${NPZ%.npz}"{.npz,.png,.*metrics.json}; do
    if [[ -e $file ]]; then say '  %s\n' "${file#"$RUN_DIR"/}"; fi
  done
}

main() {
  case " $* " in *" -h "* | *" --help "*)
    usage
    return
    ;;
  esac
  cd "$ROOT"
  # shellcheck source=setup_env.sh
  source "$ROOT/setup_env.sh"
  setup_env requirements.txt
  PYTHON=${PYTHON#"$ROOT"/}
  local name
  for name in INT TERM HUP USR1; do
    # shellcheck disable=SC2064 # the name of now
    trap "on_signal $name" "$name"
  done
  trap '' PIPE
  make_plan "$@"
  choose_launchers
  export PYTHONUNBUFFERED=1 # so that a log file has the lines of all stages in their order
  run_stages
  print_results
}

main "$@"
