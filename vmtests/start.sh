#!/usr/bin/env bash
# What a guest does, started by virtme's init as root. The directory shared with the host, /run/share, has
#
#   environment   variables for the command, as shell assignments
#   quick         directories to read through a mount that caches, one a line
#   modules       kernel modules to load; those a kernel has built in or lacks are passed over
#   command       what to run, for bash
#
# and gets `output`, everything that was said, and `status`, the command's exit code, or 125 where it could not be run.
# `status` is there only once the scratch disks are unmounted: a guest without it has crashed, or its power was cut.
set -uo pipefail
share=/run/share
scratch=/run/scratch
exec >"$share/output" 2>&1 </dev/null
finish() {
    echo "$1" >"$share/status.part"
    mv "$share/status.part" "$share/status"
    exit
}

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# virtme mounts the root without a cache, where Python takes seconds to import anything. What is read most is mounted
# a second time, with one: the host does not change these directories while a guest runs.
mkdir -p /run/quick
if mount -t 9p -o ro,version=9p2000.L,trans=virtio,msize=512000,cache=loose quick /run/quick; then
    while IFS= read -r directory; do
        mount --bind "/run/quick$directory" "$directory"
    done <"$share/quick"
fi
mountpoint -q /tmp || mount -t tmpfs -o mode=1777 tmpfs /tmp
while IFS= read -r directory; do # again where /tmp has just hidden one
    if [[ $directory == /tmp/* ]]; then
        mkdir -p "$directory"
        mount --bind "/run/quick$directory" "$directory"
    fi
done <"$share/quick"

mapfile -t modules <"$share/modules"
modprobe --quiet --all "${modules[@]}"

shopt -s nullglob
for disk in /sys/block/vd*; do
    kind=$(<"$disk/serial")
    mkdir -p "$scratch/$kind"
    mount -t "$kind" "/dev/${disk##*/}" "$scratch/$kind" || finish 125
done

(
    set -a
    # shellcheck disable=SC1091  # written by the host
    source "$share/environment"
    bash "$share/command"
)
status=$?

cd /
sync
for disk in "$scratch"/*; do
    umount --recursive "$disk" || {
        echo "start.sh: $disk is still in use"
        umount --lazy --recursive "$disk"
    }
done
sync
finish "$status"
