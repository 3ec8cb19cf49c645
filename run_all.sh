#!/usr/bin/env bash
# Trains a diffusion transformer and samples from it, with one command; `bash run_all.sh -h` explains it.
set -euo pipefail
unset CDPATH # with it, cd could go elsewhere

START_DIR=$PWD
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Settings: edit them here, or override them from the environment (EPOCHS=160 bash run_all.sh True 4).
# Relative paths are taken from the folder in which you run the command.
DATA_PATH=${DATA_PATH:-}                    # folder with one sub-folder of images per class; empty: the built-in demo
NPROC_PER_NODE=${NPROC_PER_NODE:-}          # processes on this machine; empty: one per GPU, or 1 without a GPU
NNODES=${NNODES:-1}                         # machines; run the same command on each, on a file system they share
NODE_RANK=${NODE_RANK:-0}                   # number of this machine, 0 to NNODES - 1
MASTER_ADDR=${MASTER_ADDR:-}                # address of machine 0, needed when NNODES > 1
MASTER_PORT=${MASTER_PORT:-29500}           # a free port of machine 0
CACHE_LATENTS=${CACHE_LATENTS:-True}        # encode every image once, before training, instead of at each epoch
LATENTS_DIR=${LATENTS_DIR:-}                # where to keep these latents; empty: under RESULTS_BASE/latents
NUM_CLASSES=${NUM_CLASSES:-}                # empty: the number of class folders
ROPE_BORDER=${ROPE_BORDER:-clamp}           # clamp (as the published weights) or exact (positions not limited)
WEIGHT_DECAY=${WEIGHT_DECAY:-0}             # of AdamW
KEEP_CHECKPOINTS=${KEEP_CHECKPOINTS:-}      # newest checkpoints to keep; empty: all
PRECISION=${PRECISION:-auto}                # fp32, bf16, or auto: bf16 where the hardware computes in it
COMPILE=${COMPILE:-False}                   # torch.compile for training
GRAD_ACCUM_STEPS=${GRAD_ACCUM_STEPS:-1}     # parts in which each process computes its batch, for less memory
GRAD_CHECKPOINTING=${GRAD_CHECKPOINTING:-False} # compute activations twice, for less memory
SAMPLE_SEED=${SAMPLE_SEED:-100}             # seed of labels and noise of the samples
FID_REFERENCE=${FID_REFERENCE:-}            # reference file of ADM, .npz of images or image folder; empty: no FID
INCEPTION_WEIGHTS=${INCEPTION_WEIGHTS:-}    # file for FID where there is no network; empty: downloaded once
if [[ -n $DATA_PATH ]]; then # the published recipe
  RESULTS_BASE=${RESULTS_BASE:-$ROOT/results}
  DEFAULT_MODEL=${DEFAULT_MODEL:-DiT-B/4}   # where the argument MODEL is not given
  if [[ -z ${MAX_STEPS:-} ]]; then
    EPOCHS=${EPOCHS:-80}                    # training ends with EPOCHS or with MAX_STEPS, whichever is set
  fi
  IMAGE_SIZE=${IMAGE_SIZE:-256}             # pixels
  GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256} # over all processes
  LR=${LR:-1e-4}
  LR_SCHEDULE=${LR_SCHEDULE:-constant}      # or linear: after warm-up down to 0 at the last step
  WARMUP_STEPS=${WARMUP_STEPS:-0}
  EMA_DECAY=${EMA_DECAY:-0.9999}
  GRAD_CLIP=${GRAD_CLIP:-}                  # largest gradient norm; empty: not limited
  FLIP=${FLIP:-True}                        # mirror half of the training images
  VAE=${VAE:-ema}                           # ema or mse (stabilityai/sd-vae-ft-...), a folder, or a hub id
  NUM_WORKERS=${NUM_WORKERS:-4}             # data-loading processes for each training process
  LOG_EVERY=${LOG_EVERY:-100}               # steps
  CKPT_EVERY=${CKPT_EVERY:-50000}           # steps
  NUM_FID_SAMPLES=${NUM_FID_SAMPLES:-50000}
  CFG_SCALE=${CFG_SCALE:-1.0}               # strength of classifier-free guidance; 1: none
  CFG_CHANNELS=${CFG_CHANNELS:-3}           # latent channels that guidance acts on: 3 (as published) or all
  SAMPLER=${SAMPLER:-ddpm}                  # ddpm, ddim or dpm++
  SAMPLING_STEPS=${SAMPLING_STEPS:-250}
  PER_PROC_BATCH_SIZE=${PER_PROC_BATCH_SIZE:-32} # samples drawn at once by each process
  CLASS_BALANCED=${CLASS_BALANCED:-False}   # equally many samples of each class instead of random labels
  FID_METRICS=${FID_METRICS:-fid,sfid,is,precision,recall,kid} # measured where FID_REFERENCE is set
else # the demo: the same pipeline at a size that a laptop trains in minutes
  RESULTS_BASE=${RESULTS_BASE:-$ROOT/results/demo}
  DEFAULT_MODEL=${DEFAULT_MODEL:-DiT-XS/2}
  if [[ -z ${EPOCHS:-} ]]; then
    MAX_STEPS=${MAX_STEPS:-2000}
  fi
  IMAGE_SIZE=${IMAGE_SIZE:-64}
  GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-32}
  LR=${LR:-1e-2}
  LR_SCHEDULE=${LR_SCHEDULE:-linear}
  WARMUP_STEPS=${WARMUP_STEPS:-}            # empty: 100, or a tenth of the steps where these are under 1,000
  EMA_DECAY=${EMA_DECAY:-0.995}
  GRAD_CLIP=${GRAD_CLIP-1}                  # lets the learning rate be this high
  FLIP=${FLIP:-False}
  VAE=${VAE:-$ROOT/assets/demo_vae}
  NUM_WORKERS=${NUM_WORKERS:-0}
  LOG_EVERY=${LOG_EVERY:-100}
  CKPT_EVERY=${CKPT_EVERY:-500}
  NUM_FID_SAMPLES=${NUM_FID_SAMPLES:-200}
  CFG_SCALE=${CFG_SCALE:-3.0}
  CFG_CHANNELS=${CFG_CHANNELS:-all}         # its autoencoder spreads a digit over all four
  SAMPLER=${SAMPLER:-dpm++}
  SAMPLING_STEPS=${SAMPLING_STEPS:-20}
  PER_PROC_BATCH_SIZE=${PER_PROC_BATCH_SIZE:-100}
  CLASS_BALANCED=${CLASS_BALANCED:-True}
  FID_METRICS=${FID_METRICS:-fid,sfid,is,precision,recall} # kid needs 1000 samples
fi
EPOCHS=${EPOCHS:-}
MAX_STEPS=${MAX_STEPS:-}
if [[ $VAE == ema ]]; then
  SAMPLE_VAE=${SAMPLE_VAE:-mse}             # decodes the samples
else
  SAMPLE_VAE=${SAMPLE_VAE:-$VAE}
fi
# End of settings.

usage() {
  cat <<'USAGE'
Usage: bash run_all.sh [USE_ROPE] [ROTATE] [THETA] [FREQS_FOR] [MAX_FREQ] [TRUNCATE_PERCENTAGE]
                       [MAX_FREQ_LANG] [MIN_FREQ_LANG] [SAME_THETA] [SEED] [MODEL]

Trains a class-conditional diffusion transformer (stage 1) on latents encoded once beforehand (stage 0), then
samples from its newest checkpoint (stage 2). With DATA_PATH=/path/to/ImageNet/train it runs the published
recipe; without, a demo on handwritten digits, of which a classifier measures the samples at the end (stage 3).
With FID_REFERENCE=/path/to/VIRTUAL_imagenet256_labeled.npz stage 3 measures FID and the like.
The same command goes on after an interruption; when everything is finished, it says so and does nothing twice.

Arguments; - or nothing keeps a default:

      argument             default   meaning
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

Examples:
  bash run_all.sh                                     axial RoPE
  bash run_all.sh False                               no RoPE: the DiT baseline
  bash run_all.sh True 2                              Spiral RoPE, K = 4 directions
  bash run_all.sh - 4                                 Spiral RoPE, K = 8 directions
  bash run_all.sh - 3 - - - - - - - - DiT-XL/2        Spiral RoPE, K = 6 directions, the largest model
  bash run_all.sh - - - - - - - - - 123               another seed
  DATA_PATH=/path/to/ImageNet/train bash run_all.sh - 4
  FID_REFERENCE=/path/to/VIRTUAL_imagenet256_labeled.npz DATA_PATH=/path/to/ImageNet/train bash run_all.sh - 4
  EPOCHS=160 NPROC_PER_NODE=4 DATA_PATH=/path/to/ImageNet/train bash run_all.sh - 4

Settings, each overridden by an environment variable of its name, or edited at the top of run_all.sh:

USAGE
  sed -n '/^# Settings: /,/^# End of settings/p' "$ROOT/run_all.sh" | sed '1d;$d'
}

die() { # MESSAGE: a mistake of the user; one line, and the status that tells it from a failure
  printf 'run_all.sh: error: %s\n' "$*" >&2
  exit 2
}

shown() { # VALUE: quoted for a message, on one line whatever is in it
  case $1 in
    *[[:cntrl:]]*) printf '%q' "$1" ;;
    *) printf "'%s'" "$1" ;;
  esac
}

refuse() { # NAME EXPECTED: ends with the message about the value of NAME
  local i
  for ((i = 0; i < ${#ARGUMENTS[@]}; i++)); do
    if [[ ${ARGUMENTS[i]} == "$1" ]]; then
      die "argument $((i + 1)), $1, is $(shown "${!1}"), expected $2; - keeps the default ${DEFAULTS[i]}"
    fi
  done
  die "$1 is $(shown "${!1}"), expected $2; change it in the environment or in the settings of run_all.sh"
}

truth() { # NAME: accepts the usual spellings and leaves True or False
  case ${!1} in
    [Tt][Rr][Uu][Ee] | [Yy][Ee][Ss] | 1) printf -v "$1" True ;;
    [Ff][Aa][Ll][Ss][Ee] | [Nn][Oo] | 0) printf -v "$1" False ;;
    *) refuse "$1" "True or False" ;;
  esac
}

choice() { # NAME VALUE...: one of these values
  local name=$1 value
  shift
  for value in "$@"; do
    if [[ ${!name} == "$value" ]]; then return; fi
  done
  refuse "$name" "one of: $*"
}

whole() { # NAME LEAST [MOST]: a whole number in this range; without MOST, of at most 18 digits, which bash can count to
  local digits='^(0|[1-9][0-9]{0,17})$' expected="a whole number >= $2"
  if (($# > 2)); then expected="a whole number from $2 to $3"; fi
  [[ ${!1} =~ $digits ]] || refuse "$1" "$expected"
  if ((${!1} < $2 || ($# > 2 && ${!1} > ${3:-0}))); then refuse "$1" "$expected"; fi
}

number() { # NAME CONDITION WORDS: a finite number v for which the awk CONDITION holds
  local decimal='^[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?$'
  [[ ${!1} =~ $decimal ]] || refuse "$1" "$3"
  LC_ALL=C awk -v text="${!1}" "BEGIN { v = text + 0; exit !(v > -1e300 && v < 1e300 && ($2)) }" || refuse "$1" "$3"
}

spell() { # NAME SUFFIX: one spelling for equal numbers, so that 1e4 and 10000 share a folder; with SUFFIX .0, 1 is 1.0
  local text
  text=$(LC_ALL=C awk -v text="${!1}" 'BEGIN { printf "%.12g", text + 0 }')
  case $text in
    *[.e]*) ;;
    *) text+=$2 ;;
  esac
  printf -v "$1" '%s' "$text"
}

locate() { # NAME...: a relative path, as seen from the repository's folder, where the commands run
  local name path
  for name in "$@"; do
    path=${!name}
    case $path in
      '') continue ;;
      /*) ;;
      *) path=$START_DIR/$path ;;
    esac
    path=${path#"$ROOT"/}
    case $path in
      -*) path=./$path ;; # a file name is no option
    esac
    printf -v "$name" '%s' "$path"
  done
}

read_arguments() { # the command line: sets the eleven variables of the table
  ARGUMENTS=(USE_ROPE ROTATE THETA FREQS_FOR MAX_FREQ TRUNCATE_PERCENTAGE MAX_FREQ_LANG MIN_FREQ_LANG SAME_THETA)
  ARGUMENTS+=(SEED MODEL)
  DEFAULTS=(True 0 10000 lang 10 0.0 1.5 0.0 False 0 "$DEFAULT_MODEL")
  local argument i value
  for argument in "$@"; do
    case $argument in
      -h | --help)
        usage
        exit 0
        ;;
    esac
  done
  for argument in "$@"; do
    case $argument in
      - | -[0-9.]*) ;; # a negative number is refused below, where its range is known
      -*) die "unknown option $(shown "$argument"), expected positional arguments; bash run_all.sh -h lists them" ;;
    esac
  done
  if (($# > ${#ARGUMENTS[@]})); then
    die "$# arguments given, expected at most ${#ARGUMENTS[@]}; bash run_all.sh -h lists them"
  fi
  for ((i = 0; i < ${#ARGUMENTS[@]}; i++)); do
    value=${1:-}
    if (($# > 0)); then shift; fi
    if [[ -z $value || $value == - ]]; then value=${DEFAULTS[i]}; fi
    printf -v "${ARGUMENTS[i]}" '%s' "$value"
  done
}

check_arguments() {
  local i name models='^DiT-(XL|L|B|S|XS)/(2|4|8)$'
  truth USE_ROPE
  whole ROTATE 0
  number THETA 'v > 0' 'a number > 0'
  choice FREQS_FOR lang pixel
  number MAX_FREQ 'v > 0' 'a number > 0'
  number TRUNCATE_PERCENTAGE 'v >= 0 && v <= 1' 'a number from 0 to 1'
  number MAX_FREQ_LANG 'v > 0' 'a number > 0'
  number MIN_FREQ_LANG 'v >= 0' 'a number >= 0'
  truth SAME_THETA
  whole SEED 0
  if [[ ! $MODEL =~ $models ]]; then
    refuse MODEL "DiT-XL, DiT-L, DiT-B, DiT-S or DiT-XS, then /2, /4 or /8"
  fi
  PATCH_SIZE=${MODEL##*/}
  spell THETA ''
  spell MAX_FREQ ''
  spell TRUNCATE_PERCENTAGE .0
  spell MAX_FREQ_LANG .0
  spell MIN_FREQ_LANG .0
  if [[ $USE_ROPE == True ]]; then
    check_rotate
    return
  fi
  for ((i = 1; i < 9; i++)); do
    name=${ARGUMENTS[i]}
    if [[ ${!name} != "${DEFAULTS[i]}" ]]; then
      die "argument $((i + 1)), $name, is $(shown "${!name}") but USE_ROPE is False," \
        "expected no RoPE arguments then; give - for $name, or True for USE_ROPE"
    fi
  done
}

check_rotate() { # the directions must share out the channels of a head: see SpiralRoPE in rope.py
  local head_dim=64 unit=4 valid="0" r same=''
  case $MODEL in
    DiT-XL/*) head_dim=72 ;;
  esac
  if [[ $SAME_THETA == True ]]; then
    unit=8
    same=" and SAME_THETA True"
  fi
  for ((r = 1; r * unit <= head_dim; r++)); do
    if ((head_dim % (unit * r) == 0)); then valid+=" $r"; fi
  done
  case " $valid " in
    *" $ROTATE "*) ;;
    *) refuse ROTATE "one of: $valid (head dimension $head_dim of $MODEL$same; 0 is axial RoPE)" ;;
  esac
}

check_settings() {
  local name
  for name in NNODES NPROC_PER_NODE GRAD_ACCUM_STEPS; do
    if [[ -n ${!name} ]]; then whole "$name" 1 99999; fi
  done
  whole IMAGE_SIZE 1 99999
  for name in GLOBAL_BATCH_SIZE LOG_EVERY CKPT_EVERY NUM_FID_SAMPLES PER_PROC_BATCH_SIZE; do
    whole "$name" 1
  done
  if [[ -n $EPOCHS ]]; then whole EPOCHS 1 999999; fi
  for name in MAX_STEPS NUM_CLASSES KEEP_CHECKPOINTS; do
    if [[ -n ${!name} ]]; then whole "$name" 1; fi
  done
  for name in NODE_RANK NUM_WORKERS SAMPLE_SEED; do
    whole "$name" 0
  done
  check_warmup
  whole SAMPLING_STEPS 1 1000
  whole MASTER_PORT 1 65535
  for name in CACHE_LATENTS COMPILE GRAD_CHECKPOINTING FLIP CLASS_BALANCED; do
    truth "$name"
  done
  number LR 'v > 0' 'a number > 0'
  number EMA_DECAY 'v >= 0 && v < 1' 'a number >= 0 and < 1'
  number WEIGHT_DECAY 'v >= 0' 'a number >= 0'
  number CFG_SCALE 'v >= 1' 'a number >= 1'
  if [[ -n $GRAD_CLIP ]]; then number GRAD_CLIP 'v > 0' 'a number > 0'; fi
  choice LR_SCHEDULE constant linear
  choice PRECISION auto fp32 bf16
  choice CFG_CHANNELS 3 all
  choice SAMPLER ddpm ddim dpm++
  choice ROPE_BORDER clamp exact
  if ((NODE_RANK >= NNODES)); then refuse NODE_RANK "less than NNODES, which is $NNODES"; fi
  if ((NNODES > 1)) && [[ -z $MASTER_ADDR ]]; then
    refuse MASTER_ADDR "the address of machine 0, since NNODES is $NNODES"
  fi
}

check_warmup() { # where none is given, it is that of the demo
  local steps=$MAX_STEPS
  if [[ -z $WARMUP_STEPS ]]; then
    if [[ -z $steps ]]; then steps=$((EPOCHS * 1797 / GLOBAL_BATCH_SIZE)); fi
    WARMUP_STEPS=$((steps < 1000 ? steps / 10 : 100))
  fi
  whole WARMUP_STEPS 0
  if [[ -n $MAX_STEPS ]] && ((WARMUP_STEPS >= MAX_STEPS)); then
    refuse WARMUP_STEPS "fewer than MAX_STEPS, which is $MAX_STEPS"
  fi
}

check_data() { # sets CLASSES, the number of class folders
  local folder
  CLASSES=10
  if [[ -n $DATA_PATH ]]; then
    [[ -e $DATA_PATH ]] || refuse DATA_PATH "a folder with one sub-folder of images per class, but it does not exist"
    [[ -d $DATA_PATH ]] || refuse DATA_PATH "a folder with one sub-folder of images per class, not a file"
    [[ -r $DATA_PATH && -x $DATA_PATH ]] || refuse DATA_PATH "a folder that you may read"
    CLASSES=0
    for folder in "$DATA_PATH"/*/; do
      if [[ -d $folder ]]; then CLASSES=$((CLASSES + 1)); fi
    done
    ((CLASSES > 0)) || refuse DATA_PATH "a folder with one sub-folder of images per class, but it has no sub-folder"
  fi
  if [[ -n $NUM_CLASSES ]] && ((NUM_CLASSES < CLASSES)); then
    refuse NUM_CLASSES "at least $CLASSES, the number of class folders"
  fi
}

check_vae() { # NAME: ema, mse, a folder with a config.json, or else a hub id, which only the hub can check
  local name=$1 vae=${!1} missing="ema, mse, a hub id, or a folder, but there is no such folder"
  case $vae in
    ema | mse) return ;;
  esac
  if [[ $vae == /* || -e $START_DIR/$vae ]]; then
    locate "$name"
    [[ -d ${!name} ]] || refuse "$name" "$missing"
    [[ -f ${!name}/config.json ]] ||
      refuse "$name" "a folder with a diffusers AutoencoderKL, but it holds no config.json"
    return
  fi
  case $vae in # a hub id has one slash at most, between two names
    -* | ./* | ../* | '~'* | */*/* | */) refuse "$name" "$missing" ;;
  esac
}

check_image_size() { # the latent grid must divide into patches; what the hub alone knows, train.py checks
  local config down=1 levels unit
  case $VAE in
    ema | mse) down=8 ;;
  esac
  if [[ -f $VAE/config.json ]]; then
    config=$(tr -d ' \n\r\t' <"$VAE/config.json")
    case $config in
      *'"block_out_channels":['*)
        levels=${config#*'"block_out_channels":['}
        levels=${levels%%]*}
        levels=${levels//[^,]/}
        down=$((1 << ${#levels}))
        ;;
    esac
  fi
  unit=$((down * PATCH_SIZE))
  if ((IMAGE_SIZE % unit != 0)); then
    refuse IMAGE_SIZE "a multiple of $unit (patch size $PATCH_SIZE of $MODEL x $down, the VAE's down-sampling)"
  fi
}

check_evaluation() { # what stage 3 would only find out after days of training
  local name least rest=$FID_METRICS,
  if [[ -z $FID_REFERENCE ]]; then return; fi
  [[ -e $FID_REFERENCE ]] || refuse FID_REFERENCE "a reference file or a folder of images, but it does not exist"
  [[ -r $FID_REFERENCE ]] || refuse FID_REFERENCE "a file or folder that you may read"
  if [[ -n $INCEPTION_WEIGHTS && ! -f $INCEPTION_WEIGHTS ]]; then
    refuse INCEPTION_WEIGHTS "a file with the weights of Inception-v3, but there is no such file"
  fi
  while [[ -n $rest ]]; do
    name=${rest%%,*}
    rest=${rest#*,}
    case $name in
      fid | sfid) least=2 ;;
      is) least=10 ;;
      precision | recall) least=4 ;;
      kid) least=1000 ;;
      *) refuse FID_METRICS "some of fid,sfid,is,precision,recall,kid with commas between" ;;
    esac
    if ((NUM_FID_SAMPLES < least)); then
      refuse NUM_FID_SAMPLES "at least $least, since FID_METRICS has $name"
    fi
  done
}

check_results() { # the first folder above it that exists must be one in which this user may write
  local folder=$1
  while [[ ! -e $folder ]]; do
    case $folder in
      */*)
        folder=${folder%/*}
        folder=${folder:-/}
        ;;
      *) folder=. ;;
    esac
  done
  [[ -d $folder ]] || refuse RESULTS_BASE "a folder, but $(shown "$folder") is a file"
  [[ -w $folder ]] || refuse RESULTS_BASE "a folder in which you may write"
}

check_batch() { # once the number of processes is known
  local unit=$((NPROC_PER_NODE * NNODES * GRAD_ACCUM_STEPS))
  local product="the number of processes (NPROC_PER_NODE $NPROC_PER_NODE x NNODES $NNODES)"
  if ((GRAD_ACCUM_STEPS > 1)); then product+=" times GRAD_ACCUM_STEPS"; fi
  if ((GLOBAL_BATCH_SIZE % unit != 0)); then refuse GLOBAL_BATCH_SIZE "a multiple of $unit, $product"; fi
}

name_folders() { # sets RUN_DIR, DATA and LATENTS_DIR
  local frequencies flips='' parent
  RUN_DIR=$RESULTS_BASE/${MODEL//\//-}
  if [[ $USE_ROPE == True ]]; then
    frequencies=freqslang_maxfreqlang${MAX_FREQ_LANG}_minfreqlang${MIN_FREQ_LANG}
    if [[ $FREQS_FOR == pixel ]]; then frequencies=freqspixel_maxfreq${MAX_FREQ}; fi
    RUN_DIR+=/RoPE_rotate${ROTATE}_theta${THETA}_${frequencies}_trunc${TRUNCATE_PERCENTAGE}_sametheta${SAME_THETA}
    if [[ $ROPE_BORDER == exact ]]; then RUN_DIR+=_borderexact; fi
    RUN_DIR+=_seed${SEED}
  else
    RUN_DIR+=/NoRoPE_seed${SEED}
  fi
  DATA=${DATA_PATH:-$RESULTS_BASE/digits}
  if [[ -z $LATENTS_DIR ]]; then
    # Named after all that decides the latents, so that another setting makes another cache.
    LATENTS_DIR=digits
    if [[ -n $DATA_PATH ]]; then
      LATENTS_DIR=$(cd "$DATA_PATH" && pwd)
      parent=${LATENTS_DIR%/*}
      LATENTS_DIR=${parent##*/}-${LATENTS_DIR##*/}
    fi
    if [[ $FLIP == False ]]; then flips=-noflip; fi
    parent=${VAE%/}
    LATENTS_DIR=$RESULTS_BASE/latents/${LATENTS_DIR#-}-${IMAGE_SIZE}-vae-${parent##*/}$flips
  fi
}

count_processes() { # one for each GPU that PyTorch sees; its import takes seconds, so only where a GPU may be
  if [[ -n $NPROC_PER_NODE ]]; then return; fi
  NPROC_PER_NODE=1
  if [[ -e /dev/nvidiactl || -e /dev/kfd ]] || command -v nvidia-smi >/dev/null; then
    NPROC_PER_NODE=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
  fi
}

build_commands() { # sets LAUNCH, LAUNCH_HERE (on this machine alone) and the arguments of each stage, script first
  local torchrun=(-m torch.distributed.run --nproc_per_node "$NPROC_PER_NODE")
  # The workers get time to write a checkpoint before torchrun, told to stop, ends them.
  torchrun+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout 600)
  LAUNCH_HERE=("$PYTHON")
  if ((NPROC_PER_NODE > 1)); then LAUNCH_HERE+=("${torchrun[@]}" --standalone --local-addr 127.0.0.1); fi
  LAUNCH=("${LAUNCH_HERE[@]}")
  if ((NNODES > 1)); then
    LAUNCH=("$PYTHON" "${torchrun[@]}" --nnodes "$NNODES" --node_rank "$NODE_RANK")
    LAUNCH+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
  fi

  CACHE=(cache_latents.py --data-path "$DATA" --latents-dir "$LATENTS_DIR" --vae "$VAE" --image-size "$IMAGE_SIZE")
  CACHE+=(--num-workers "$NUM_WORKERS")

  TRAIN=(train.py --results-dir "$RUN_DIR" --model "$MODEL" --image-size "$IMAGE_SIZE" --vae "$VAE")
  if [[ $CACHE_LATENTS == True ]]; then TRAIN+=(--latents-dir "$LATENTS_DIR"); else TRAIN+=(--data-path "$DATA"); fi
  if [[ -n $NUM_CLASSES ]]; then TRAIN+=(--num-classes "$NUM_CLASSES"); fi
  if [[ -n $EPOCHS ]]; then TRAIN+=(--epochs "$EPOCHS"); fi
  if [[ -n $MAX_STEPS ]]; then TRAIN+=(--max-steps "$MAX_STEPS"); fi
  TRAIN+=(--global-batch-size "$GLOBAL_BATCH_SIZE" --global-seed "$SEED" --lr "$LR" --lr-schedule "$LR_SCHEDULE")
  TRAIN+=(--warmup-steps "$WARMUP_STEPS" --ema-decay "$EMA_DECAY" --weight-decay "$WEIGHT_DECAY")
  if [[ -n $GRAD_CLIP ]]; then TRAIN+=(--grad-clip "$GRAD_CLIP"); fi
  if [[ $FLIP == True ]]; then
    CACHE+=(--flip)
    TRAIN+=(--flip)
  else
    CACHE+=(--no-flip)
    TRAIN+=(--no-flip)
  fi
  TRAIN+=(--num-workers "$NUM_WORKERS" --log-every "$LOG_EVERY" --ckpt-every "$CKPT_EVERY" --precision "$PRECISION")
  if [[ -n $KEEP_CHECKPOINTS ]]; then TRAIN+=(--keep-checkpoints "$KEEP_CHECKPOINTS"); fi
  if [[ $COMPILE == True ]]; then TRAIN+=(--compile); fi
  if ((GRAD_ACCUM_STEPS > 1)); then TRAIN+=(--grad-accum-steps "$GRAD_ACCUM_STEPS"); fi
  if [[ $GRAD_CHECKPOINTING == True ]]; then TRAIN+=(--grad-checkpointing); fi
  if [[ $USE_ROPE == True ]]; then
    TRAIN+=(--use-rope --rope-rotate "$ROTATE" --rope-theta "$THETA" --rope-freqs-for "$FREQS_FOR")
    TRAIN+=(--rope-max-freq "$MAX_FREQ" --rope-truncate-percentage "$TRUNCATE_PERCENTAGE")
    TRAIN+=(--rope-max-freq-lang "$MAX_FREQ_LANG" --rope-min-freq-lang "$MIN_FREQ_LANG" --rope-border "$ROPE_BORDER")
    if [[ $SAME_THETA == True ]]; then TRAIN+=(--rope-same-theta); fi
  fi
}

build_sample_command() { # CHECKPOINT: everything about the model is in the checkpoint
  SAMPLE=(sample_ddp.py --ckpt "$1" --sample-dir "$RUN_DIR/samples" --vae "$SAMPLE_VAE")
  SAMPLE+=(--num-fid-samples "$NUM_FID_SAMPLES" --per-proc-batch-size "$PER_PROC_BATCH_SIZE" --cfg-scale "$CFG_SCALE")
  SAMPLE+=(--sampler "$SAMPLER" --num-sampling-steps "$SAMPLING_STEPS" --global-seed "$SAMPLE_SEED")
  SAMPLE+=(--cfg-channels "$CFG_CHANNELS" --precision "$PRECISION")
  if [[ $CLASS_BALANCED == True ]]; then SAMPLE+=(--class-balanced); fi
}

print_configuration() {
  local name
  if [[ -z $DATA_PATH ]]; then
    echo "DATA_PATH is not set: this is the built-in demo on 1,797 handwritten digits;" \
      "DATA_PATH=/path/to/ImageNet/train runs the published recipe instead."
  fi
  echo "Configuration:"
  for name in "${ARGUMENTS[@]}" DATA RUN_DIR NPROC_PER_NODE NNODES EPOCHS MAX_STEPS IMAGE_SIZE GLOBAL_BATCH_SIZE \
    LR LR_SCHEDULE WARMUP_STEPS EMA_DECAY FLIP VAE CACHE_LATENTS PRECISION SAMPLE_VAE NUM_FID_SAMPLES SAMPLER \
    SAMPLING_STEPS CFG_SCALE CFG_CHANNELS CLASS_BALANCED SAMPLE_SEED FID_REFERENCE; do
    if [[ -n ${!name} ]]; then printf '  %-20s %s\n' "$name" "${!name}"; fi
  done
  if [[ $USE_ROPE == True && $FREQS_FOR == pixel ]]; then
    echo "FREQS_FOR pixel: THETA, MAX_FREQ_LANG and MIN_FREQ_LANG have no effect."
  elif [[ $USE_ROPE == True && $MAX_FREQ != "${DEFAULTS[4]}" ]]; then
    echo "FREQS_FOR lang: MAX_FREQ has no effect."
  fi
}

# Told to stop, this script passes it on to the stage that runs and ends after it. Ctrl-C reaches the stage as
# well, but a background process of a script ignores SIGINT unless it asks for it, so each signal goes on as SIGTERM.
STOPPED=''
CHILD=''
on_signal() {
  STOPPED=1
  if [[ -n $CHILD ]]; then kill -TERM "$CHILD" 2>/dev/null || true; fi
}

say_how_to_go_on() { # STAGE
  printf '\nrun_all.sh: stopped during %s; run the same command again to go on from there\n' "$1"
  exit 0
}

run_stage() { # STAGE COMMAND...: shows the command and runs it to its end
  local stage=$1 status=0
  shift
  if [[ -n $STOPPED ]]; then say_how_to_go_on "$stage"; fi
  printf '\n%s\n ' "$stage"
  printf ' %q' "$@"
  printf '\n'
  # In the background with wait, since bash would hold back a signal until a foreground command ends.
  "$@" &
  CHILD=$!
  if [[ -n $STOPPED ]]; then on_signal; fi
  wait "$CHILD" || status=$?
  while [[ -n $STOPPED ]] && kill -0 "$CHILD" 2>/dev/null; do
    wait "$CHILD" || true
  done
  CHILD=''
  WORKED=1
  if [[ -n $STOPPED ]] || ((status != 0)); then fail "$stage" "$status"; fi
}

fail() { # STAGE STATUS
  if [[ -n $STOPPED ]]; then say_how_to_go_on "$1"; fi
  local how="failed with status $2; see its message above"
  if (($2 > 128)); then how="was ended by signal $(($2 - 128))"; fi
  printf '\nrun_all.sh: %s %s. Run again, it goes on from there.\n' "$1" "$how" >&2
  exit "$2"
}

# A stage that finished leaves its own command in a small file, by which the next start knows that nothing is left
# to do, without seconds of imports. Several machines always ask the stage itself, so that they all do the same.
is_finished() { # NAME COMMAND...
  ((NNODES == 1)) && is_recorded "$@"
}

is_recorded() { # NAME COMMAND...
  local record=$RUN_DIR/.finished/$1
  shift
  [[ -f $record && $(<"$record") == "$(printf '%q ' "$@")" ]]
}

set_finished() { # NAME COMMAND...
  local record=$RUN_DIR/.finished/$1
  shift
  if ((NODE_RANK == 0)); then
    mkdir -p "$RUN_DIR/.finished"
    printf '%q ' "$@" >"$record.partial"
    mv "$record.partial" "$record"
  fi
}

appears() { # FILE: a shared file system may show another machine's file only after a while
  local seconds
  for ((seconds = 0; NNODES > 1 && seconds < 60; seconds++)); do
    if [[ -e $1 ]]; then return; fi
    sleep 1
  done
  [[ -e $1 ]]
}

find_checkpoint() { # sets CHECKPOINT to the newest one, or to nothing
  local file step newest=-1
  CHECKPOINT=''
  for file in "$RUN_DIR"/checkpoints/*.pt; do
    step=${file##*/}
    step=${step%.pt}
    if [[ $step =~ ^[0-9]{7,18}$ ]] && ((10#$step > newest)); then
      newest=$((10#$step))
      CHECKPOINT=$file
    fi
  done
}

train() { # stages 0 and 1
  local stage="Stage 1 (training)"
  find_checkpoint
  if [[ -n $CHECKPOINT && -f $RUN_DIR/finished.json ]] && is_finished train "${TRAIN[@]}"; then
    printf '\n%s: finished already\n' "$stage"
    return
  fi
  if [[ -z $DATA_PATH && ! -d $DATA ]]; then # the folder appears when it is whole
    run_stage "Data (the digits as a folder of images)" "$PYTHON" -m demo.digits "$DATA"
  fi
  if [[ $CACHE_LATENTS == True ]]; then
    run_stage "Stage 0 (latents)" "${LAUNCH[@]}" "${CACHE[@]}"
  fi
  run_stage "$stage" "${LAUNCH[@]}" "${TRAIN[@]}"
  # train.py writes this file after its last checkpoint; without it, the stage itself was told to stop.
  appears "$RUN_DIR/finished.json" || say_how_to_go_on "$stage"
  set_finished train "${TRAIN[@]}"
  find_checkpoint
  if [[ -z $CHECKPOINT ]]; then
    printf '\nrun_all.sh: %s left no checkpoint in %s\n' "$stage" "$RUN_DIR/checkpoints" >&2
    exit 1
  fi
}

sample() { # stage 2; sets NPZ
  local stage="Stage 2 (sampling)" name=$RUN_DIR/.finished/npz
  build_sample_command "$CHECKPOINT"
  if [[ -f $name ]] && NPZ=$RUN_DIR/samples/$(<"$name") && [[ -f $NPZ ]] && is_finished sample "${SAMPLE[@]}"; then
    printf '\n%s: finished already\n' "$stage"
    return
  fi
  NPZ=$("$PYTHON" "${SAMPLE[@]}" --print-name) || fail "$stage" $?
  NPZ=$RUN_DIR/samples/${NPZ##*/} # whatever was printed before it, and line breaks in RUN_DIR
  run_stage "$stage" "${LAUNCH[@]}" "${SAMPLE[@]}"
  appears "$NPZ" || say_how_to_go_on "$stage"
  if ((NODE_RANK == 0)); then printf '%s' "${NPZ##*/}" >"$name"; fi
  set_finished sample "${SAMPLE[@]}"
}

evaluate() { # stage 3: the demo's digits, and FID where there is a reference; machine 0 measures for all
  local stage="Stage 3 (evaluation)" launch=("$PYTHON") command=(evaluate.py --samples "$NPZ")
  METRICS=${NPZ%.npz}.metrics.json
  if [[ -z $DATA_PATH ]]; then command+=(--digits); fi
  if [[ -n $FID_REFERENCE ]]; then
    launch=("${LAUNCH_HERE[@]}")
    command+=(--reference "$FID_REFERENCE" --metrics "$FID_METRICS" --num-workers "$NUM_WORKERS")
    if [[ -n $INCEPTION_WEIGHTS ]]; then command+=(--inception-weights "$INCEPTION_WEIGHTS"); fi
  elif [[ -n $DATA_PATH ]]; then
    return
  fi
  if ((NODE_RANK > 0)); then return; fi
  # Neither samples nor reference may have been made again since.
  if [[ -f $METRICS && ! $NPZ -nt $METRICS && ! $FID_REFERENCE -nt $METRICS ]] &&
    is_recorded evaluate "${command[@]}"; then
    printf '\n%s: finished already\n' "$stage"
    return
  fi
  run_stage "$stage" "${launch[@]}" "${command[@]}"
  run_stage "Report (the run's page, now with the evaluation)" "$PYTHON" -m runtime.report "$RUN_DIR"
  set_finished evaluate "${command[@]}"
}

print_results() {
  if [[ -z $WORKED ]]; then
    printf '\nEverything was finished already; nothing was done again. Results:\n'
  else
    printf '\nFinished. Results:\n'
  fi
  print_result "run folder" "$RUN_DIR"
  print_result "checkpoint" "$CHECKPOINT"
  print_result "loss curve" "$RUN_DIR/loss.png"
  print_result "report" "$RUN_DIR/report.html"
  print_result "samples" "$NPZ"
  print_result "sample grid" "${NPZ%.npz}.png"
  print_result "metrics" "$METRICS"
  print_metric label_accuracy "label accuracy" 100 '%.1f %%'
  print_metric pixel_frechet_distance_8x8_digits "pixel Fréchet distance on 8 x 8 digits" 1 '%.4f'
  print_metric fid FID 1 '%.2f'
  print_metric sfid sFID 1 '%.2f'
  print_metric inception_score "Inception Score" 1 '%.2f'
  print_metric precision precision 1 '%.4f'
  print_metric recall recall 1 '%.4f'
  print_metric kid KID 1 '%.6f'
}

print_metric() { # KEY NAME FACTOR FORMAT: a number of METRICS, if it is there
  local value
  if [[ ! -f $METRICS ]]; then return; fi
  value=$(sed -n "s/^  \"$1\": *\([0-9.e+-][0-9.e+-]*\),*\$/\1/p" "$METRICS")
  if [[ -z $value ]]; then return; fi
  LC_ALL=C awk -v name="$2" -v value="$value" -v factor="$3" \
    "BEGIN { printf \"  %-14s  $4\\n\", name, factor * value }"
}

print_result() { # WHAT PATH: where it lies, if it was made
  if [[ -e $2 ]]; then printf '  %-14s  %s\n' "$1" "$2"; fi
}

main() {
  read_arguments "$@"
  check_arguments
  cd "$ROOT"
  check_settings
  locate DATA_PATH RESULTS_BASE LATENTS_DIR FID_REFERENCE INCEPTION_WEIGHTS
  check_vae VAE
  check_vae SAMPLE_VAE
  check_data
  check_image_size
  check_evaluation
  check_results "$RESULTS_BASE"
  if [[ -n $NPROC_PER_NODE ]]; then check_batch; fi

  # shellcheck source=setup_env.sh
  source "$ROOT/setup_env.sh"
  setup_env requirements.txt
  PYTHON=${PYTHON#"$ROOT"/}
  count_processes
  check_batch
  name_folders
  build_commands
  print_configuration
  WORKED=''
  trap on_signal INT TERM HUP USR1
  export PYTHONUNBUFFERED=1 # so that a log file has the lines of all stages in their order
  train
  sample
  evaluate
  print_results
}

main "$@"
