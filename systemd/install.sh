#!/bin/sh
# Installs the appliance as a systemd service, brings an installation up to date, or removes it.
#
#   sudo systemd/install.sh [--gpu] [--source PATH] [--venv FOLDER]
#   sudo systemd/install.sh --uninstall
#
#   --gpu          also install the CUDA libraries and let the service use NVIDIA devices
#   --source PATH  install the program from this folder or wheel instead of the folder that this script lies in
#   --venv FOLDER  use this virtual environment, which has the appliance already, instead of making one
#
#   PREFIX=/opt/appliance  where program, experts and profiles go
#   DESTDIR=               install below this folder, for packages and tests: no user is made, systemd is not called
#   PYTHON=python3         Python 3.11 or later
#
# Configuration, experts and profiles that are there already are never overwritten or removed, nor is the state.
set -eu
umask 022

DESTDIR=${DESTDIR:-}
PREFIX=${PREFIX:-/opt/appliance}
PYTHON=${PYTHON:-python3}
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
project=$(dirname -- "$here")
source=$project
venv=
extras=broker
gpu=no
job=install

say() { printf '%s\n' "$*"; }
fail() { say "install.sh: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --gpu) gpu=yes extras=broker,cuda ;;
        --source) source=${2:?--source needs a path}; shift ;;
        --venv) venv=${2:?--venv needs a folder}; shift ;;
        --uninstall) job=uninstall ;;
        -h | --help) sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
        *) fail "unknown option $1 (see --help)" ;;
    esac
    shift
done

case $PREFIX in
    /*[!/]*) ;;
    *) fail "PREFIX must be an absolute folder other than /, not '$PREFIX'" ;;
esac
case $PREFIX in
    *[!A-Za-z0-9/._+-]*) fail "PREFIX has characters that a unit file does not take: '$PREFIX'" ;;
esac
[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || fail "run it as root, or set DESTDIR"

home=$DESTDIR$PREFIX
etc=$DESTDIR/etc/appliance
units=$DESTDIR/etc/systemd/system
sysusers=$DESTDIR/etc/sysusers.d
command=$DESTDIR/usr/local/bin/appliance

# place FROM TO: a file that is ours, with the prefix written into it.
place() {
    mkdir -p "$(dirname -- "$2")"
    sed "s|/opt/appliance|$PREFIX|g" "$1" >"$2.part"
    chmod 644 "$2.part"
    mv -f "$2.part" "$2"
}

# keep FROM TO: a file or folder that belongs to the operator once it is there. Never half there.
keep() {
    [ -e "$1" ] || return 0
    if [ -e "$2" ]; then
        return 0
    fi
    mkdir -p "$(dirname -- "$2")" "$home"
    rm -rf "$home/.part"
    cp -R "$1" "$home/.part"
    mv "$home/.part" "$2"
}

install_program() {
    if [ -n "$venv" ]; then
        [ -x "$venv/bin/appliance" ] || fail "$venv/bin/appliance is not there (pip install it into $venv first)"
        [ -L "$home/venv" ] || [ ! -e "$home/venv" ] || fail "$home/venv is an environment of its own (--uninstall first)"
        mkdir -p "$home"
        ln -sfn "$(CDPATH='' cd -- "$venv" && pwd)" "$home/venv"
        return
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || fail "Python 3.11 or later is needed (apt-get install python3, or set PYTHON)"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "Python's venv is needed (apt-get install python3-venv)"
    [ ! -L "$home/venv" ] || rm "$home/venv"
    mkdir -p "$home"
    say "Installing the program into $PREFIX/venv (a few minutes the first time)"
    [ -x "$home/venv/bin/python" ] || "$PYTHON" -m venv "$home/venv"
    # Built from a copy: setuptools would leave a build folder in the source, and old files in it in the next wheel.
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    if [ -d "$source" ]; then
        (cd "$source" && cp -R pyproject.toml README.md LICENSE appliance export "$work/")
        source=$work
    fi
    "$home/venv/bin/python" -m pip install --quiet --upgrade "$source[$extras]"
    if [ -n "$DESTDIR" ]; then
        # Scripts name their interpreter by its place now; it will be at $PREFIX.
        grep -rlIF "$home" "$home/venv/bin" "$home/venv/pyvenv.cfg" | xargs -r sed -i "s|$home|$PREFIX|g"
    fi
}

install_experts() {
    for path in "$project"/models_onnx/*/* "$project"/models_onnx/*.* "$project"/profiles/*; do
        keep "$path" "$home/${path#"$project"/}"
    done
    graph=$project/models_onnx/graph.toml
    if [ -e "$graph" ] && ! cmp -s "$graph" "$home/models_onnx/graph.toml"; then
        cp "$graph" "$home/models_onnx/graph.toml.new"
        say "Kept your $PREFIX/models_onnx/graph.toml; ours lies beside it as graph.toml.new"
    fi
}

install_service() {
    place "$here/appliance.service" "$units/appliance.service"
    place "$here/appliance.sysusers" "$sysusers/appliance.conf"
    if [ $gpu = yes ]; then
        place "$here/gpu.conf" "$units/appliance.service.d/gpu.conf"
    fi
    if [ -e "$etc/appliance.toml" ]; then
        say "Kept your /etc/appliance/appliance.toml"
    else
        place "$here/appliance.toml" "$etc/appliance.toml"
    fi
    for file in mosquitto.conf mosquitto.acl credentials.conf; do
        place "$here/$file" "$home/broker/$file"
    done
    for file in "$project"/docs/*.md "$project"/docs/*.json "$project"/docs/schemas/*.json; do
        [ ! -e "$file" ] || place "$file" "$home/docs/${file#"$project"/docs/}"
    done
    place "$project/LICENSE" "$home/LICENSE"
    mkdir -p "$(dirname -- "$command")"
    ln -sfn "$PREFIX/venv/bin/appliance" "$command"
}

tell_systemd() {
    systemd-sysusers "$sysusers/appliance.conf"
    systemctl daemon-reload
}

next_steps() {
    say "Installed. Next:"
    say "  1. edit /etc/appliance/appliance.toml     (every key: $PREFIX/docs/configuration.md)"
    say "  2. appliance check --config /etc/appliance/appliance.toml"
    say "  3. systemctl enable --now appliance       (after an update: systemctl restart appliance)"
    say "  4. systemctl status appliance, journalctl -u appliance -f"
}

uninstall() {
    if [ -z "$DESTDIR" ]; then
        systemctl disable --now appliance 2>/dev/null || true
    fi
    rm -f "$units/appliance.service" "$units/appliance.service.d/gpu.conf" "$sysusers/appliance.conf" "$home/LICENSE"
    rm -rf "$home/venv" "$home/docs" "$home/broker" "$home/.part" "$DESTDIR/var/cache/appliance"
    if [ "$(readlink "$command" || true)" = "$PREFIX/venv/bin/appliance" ]; then
        rm "$command"
    fi
    rmdir "$units/appliance.service.d" "$home" 2>/dev/null || true
    if [ -z "$DESTDIR" ]; then
        systemctl daemon-reload
    fi
    say "Removed. Kept, if they were there: /etc/appliance, /var/lib/appliance, $PREFIX/models_onnx, $PREFIX/profiles"
}

if [ $job = uninstall ]; then
    uninstall
    exit 0
fi
install_program
install_experts
install_service
[ -n "$DESTDIR" ] || tell_systemd
next_steps
