#!/usr/bin/env bash
# Set up what is missing, then:   ./run.sh        train a small GPT on Python's standard library (minutes, no GPU needed)
#                                 ./run.sh test   run the tests
#                                 ./run.sh setup  only the set-up
#     ./run.sh PRESET             five-minutes, xs, s, m, gpt2-small, gpt2-medium or gpt2-xl: get the data, train on
#                                 all GPUs here (five-minutes also on a CPU)
#     ./run.sh PRESET --dry_run   only print download size, memory, time and cost; other flags go to train_gpt.py
#     ./run.sh seeds PRESET N     the same (or the demo) with N seeds, and their mean and spread; see trial.py --help
#     ./run.sh proof [PRESET]     is this machine fit for training, and how fast? Minutes, no data needed
#     ./run.sh paper              paper/paper.pdf from the committed experiments and the code (needs latexmk)
# The environment is .venv. An installed torch of 2.9 or later is used as it is; otherwise requirements.txt is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '%s\n' "run.sh: $*" >&2; }
fail() { say "$@"; exit 1; }

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "Python 3.10 or later is needed; on Debian or Ubuntu: sudo apt install python3 python3-venv"
}

# Prints the folder of an installed torch of 2.9 or later, or nothing.
torch_of() {
    "$1" -c '
import importlib.util, re, sys
spec = importlib.util.find_spec("torch")
if spec and spec.origin:
    from importlib.metadata import version
    if tuple(map(int, re.findall(r"\d+", version("torch"))[:2])) >= (2, 9):
        print(spec.submodule_search_locations[0].rsplit("/", 1)[0])' 2>/dev/null || true
}

# .venv/ready names the requirements that are installed. When it has all that are asked for, nothing is done or said.
set_up() {
    local missing=() file
    for file in "$@"; do
        grep -qxF "$(cksum "$file")" .venv/ready 2>/dev/null || missing+=("$file")
    done
    if [ "${#missing[@]}" -gt 0 ] || [ ! -x .venv/bin/python ]; then
        make_environment
        install "$@"
        cksum "$@" > .venv/ready
    fi
}

make_environment() {
    local python torch
    # an interrupted attempt leaves an environment without pip; it is made again
    ! .venv/bin/python -c 'import pip, sys; sys.exit(not pip.__file__.startswith(sys.prefix))' 2> /dev/null || return 0
    python="$(find_python)"
    torch="$(torch_of "$python")"
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    if ! "$python" -m venv --system-site-packages .venv > /dev/null 2>&1; then
        rm -rf .venv
        fail "python3 -m venv does not work here; on Debian or Ubuntu: sudo apt install python3-venv"
    fi
    # a torch that lives in another environment is no system package; a .pth file shows the way to it
    if [ -n "$torch" ] && [ -z "$(torch_of .venv/bin/python)" ]; then
        echo "$torch" > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
    fi
}

install() {
    local torch version skip=""
    torch="$(torch_of .venv/bin/python)"
    if [ -n "$torch" ]; then
        say "using the torch in $torch and installing the other packages"
        skip='/^torch==/d'
        # a torch of another version needs the triton that came with it
        version="$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch").split("+")[0])')"
        grep -qxF "torch==$version" requirements.txt || skip+=';/^triton==/d'
    else
        say "installing torch and the other packages; this takes a few minutes, once"
    fi
    sed "$skip" "$@" > .venv/to_install.txt
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r .venv/to_install.txt \
        || fail "pip could not install the packages (its message is above); check the network and run this again"
}

# Make what the demo trains on; fill the arrays `launch` and `training` with the command.
demo() {
    local name
    # another Python has another library, and so another tokenizer and other data
    name="demo-py$(.venv/bin/python -c 'import platform; print(platform.python_version())')"
    .venv/bin/python train_tokenizer.py --source stdlib --vocabsize 4096 --samples 20000000 --name "$name"
    .venv/bin/python download_fineweb.py --source stdlib --tokenizer "$name" --name "$name"
    launch=(.venv/bin/python)
    training=(train_gpt.py --preset demo --tokenizer "$name" --data "$name" "$@")
}

# Get what a preset trains on, in shards of 100 million tokens of which rows hold some three quarters; fill the arrays
# `launch` and `training` with the command that trains on all GPUs.
preset() {
    local preset="$1" data="fineweb_$1" source=10B-gpt2 tokenizer=gpt2 shards gigabytes download gpus argument report
    local dry_run=false flags=() pieces=(--vocabsize 50256) more=() tokens there
    for argument in "${@:2}"; do
        if [ "$argument" = --dry_run ]; then dry_run=true; else flags+=("$argument"); fi
    done
    case "$preset" in
        five-minutes) shards=2 ;;
        xs) shards=2 ;;
        s) shards=6 ;;
        m) shards=14 ;;
        gpt2-small) shards=10 ;;
        gpt2-medium) shards=42 ;;
        gpt2-xl) shards=103 ;;
    esac
    if [ "$preset" = five-minutes ]; then
        source=climbmix tokenizer=climbmix data=climbmix
        pieces=(--vocabsize 8191 --regex nanochat) more=(--val_tokens 25000000)
    elif [[ $preset != gpt2-* ]]; then
        source=10B tokenizer=web
    fi
    launch=(.venv/bin/python)
    gpus="$(.venv/bin/python -c 'import torch; print(torch.accelerator.device_count())')"
    # torchrun passes on what it handles, and then lets all processes save
    export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2,SIGXCPU
    [ "$gpus" = 0 ] || launch+=(-m benchtop.launch --standalone "--nproc_per_node=$gpus")
    # without its data the preset cannot train yet, and says that too; what it needs is what counts here
    report="$("${launch[@]}" train_gpt.py --check --preset "$preset" --data "$data" ${flags[@]+"${flags[@]}"} 2> .venv/check.txt \
        | grep -E '^(device|speed|model|budget|memory|free|time|cost|problem) ' \
        | grep -v " there is no $data in ")" || true
    [ -n "$report" ] || fail "$(tail -n 1 .venv/check.txt)"
    if [ "$preset" = five-minutes ]; then
        # as many tokens as the device has time for, but never fewer than are here already; a shard is one file of
        # about 60 million tokens
        tokens="$(sed -nE 's/^speed .* enough for ([0-9,]+)[.0-9]* million tokens$/\1/p' <<< "$report" | tr -d ,)"
        there="$(find "data/$data" -name 'train_*.bin' 2> /dev/null | wc -l)" || true
        shards=$((2 + ${tokens:-0} / 45))
        [ "$shards" -gt "$there" ] || shards="$there"
    fi
    gigabytes=$((shards * 2 / 10 + 1))
    case "$source" in
        climbmix) download="about $((1 + (shards + 1) / 10)) GB of text" ;;
        10B) download="about $((2 * (1 + (shards + 5) / 6))) GB of text" ;;
        *) download="$gigabytes GB, already tokenized by GPT-2's tokenizer" ;;
    esac
    [ "$tokenizer" = gpt2 ] || download+=", from which it learns its own tokenizer"
    say "$preset trains on $shards shards of ${source/10B*/FineWeb} ($download); they take $gigabytes GB in data/$data"
    [ "$gpus" != 0 ] || [ "$preset" = five-minutes ] \
        || say "there is no GPU here, so training runs on the CPU and takes days or longer; the demo (./run.sh) is made for CPUs"
    printf '%s\n' "$report"
    if "$dry_run"; then
        say "nothing was done; leave out --dry_run to begin"
        exit
    fi
    ! grep -q '^problem ' <<< "$report" || fail "this machine cannot train that preset; see the problem above"
    if [ "$tokenizer" != gpt2 ] && [ ! -e "tokenizers/$tokenizer" ]; then
        .venv/bin/python train_tokenizer.py --source "$source" --samples 1000000000 "${pieces[@]}" --name "$tokenizer"
    fi
    .venv/bin/python download_fineweb.py --source "$source" --num_shards "$shards" ${more[@]+"${more[@]}"} \
        --tokenizer "$tokenizer" --name "$data"
    training=(train_gpt.py --preset "$preset" --data "$data" ${flags[@]+"${flags[@]}"})
}

seeds() {
    local preset="${1:-}" count="${2:-}" name="${1:-}" flags=() gpus
    [[ $count =~ ^[1-9][0-9]*$ ]] || fail "say which preset and how many seeds, as in: ./run.sh seeds demo 8"
    shift 2
    while [ $# -gt 0 ]; do
        if [ "$1" = --name ]; then name="${2:-}"; shift; else flags+=("$1"); fi
        shift
    done
    case "$preset" in
        demo) demo ${flags[@]+"${flags[@]}"} ;;
        five-minutes)
            [[ " ${flags[*]}" == *" --measured_tflops"* ]] || fail "add --measured_tflops X, with the X that" \
                "./run.sh five-minutes --dry_run finds, so that all seeds train a model of the same size"
            preset "$preset" ${flags[@]+"${flags[@]}"}
            ;;
        xs | s | m | gpt2-small | gpt2-medium | gpt2-xl) preset "$preset" ${flags[@]+"${flags[@]}"} ;;
        *) fail "there is no preset '$preset'; use demo, five-minutes, xs, s, m, gpt2-small, gpt2-medium, gpt2-xl" ;;
    esac
    # small models train side by side, one on each GPU; large ones on all GPUs, one after the other
    gpus=1
    [[ $preset != gpt2-* ]] || gpus="$(.venv/bin/python -c 'import torch; print(max(1, torch.accelerator.device_count()))')"
    exec .venv/bin/python trial.py --seeds "$count" --processes "$gpus" --name "$name" -- "${training[@]:1}"
}

case "${1:-demo}" in
    demo)
        set_up requirements.txt
        demo "${@:2}"
        exec "${launch[@]}" "${training[@]}"
        ;;
    test)
        set_up requirements.txt requirements-dev.txt
        # three at a time on two cores, since many only wait; threads that wait must not spin, or each would take
        # another's core
        export OMP_WAIT_POLICY=passive
        exec .venv/bin/python -m pytest --numprocesses 3 --dist worksteal "${@:2}"
        ;;
    five-minutes | xs | s | m | gpt2-small | gpt2-medium | gpt2-xl)
        set_up requirements.txt
        preset "$@"
        exec "${launch[@]}" "${training[@]}"
        ;;
    seeds)
        set_up requirements.txt
        seeds "${@:2}"
        ;;
    proof)
        set_up requirements.txt
        shift
        # a first word that is no flag is the preset
        [[ ${1:--} == -* ]] || set -- --preset "$@"
        exec .venv/bin/python proof.py "$@"
        ;;
    paper)
        set_up requirements.txt
        exec .venv/bin/python paper/build.py "${@:2}"
        ;;
    setup)
        set_up requirements.txt
        ;;
    -h | --help | help)
        sed -n '2,10s/^# //p' run.sh
        ;;
    *)
        fail "there is no '$1'; type ./run.sh for the demo, ./run.sh test for the tests, ./run.sh help for more"
        ;;
esac
