#!/usr/bin/env bash
# Starts and stops a real Slurm of one node on this machine, on loopback only, to try job scripts and to test with. It needs no root.
# Usage: scripts/cluster/local_slurm.sh start|stop|status FOLDER      e.g. source <(scripts/cluster/local_slurm.sh start /tmp/slurm)
# Key, sockets, configuration, logs and process ids lie in FOLDER, which must not exist before; `stop` removes it.
# Standard output of `start` is the one line `export SLURM_CONF=...`; all else goes to standard error.
# Debian and Ubuntu have the programs in slurm-wlm and munge.
set -euo pipefail
umask 077

num_cpus=8
seconds_to_start=30
seconds_to_stop=10
daemons=(slurmd slurmctld munged) # in the order in which they are stopped

say() { printf 'local_slurm: %s\n' "$*" >&2; }

fail() {
    say "$2"
    exit "$1"
}

usage() {
    sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"
}

# A process id is reused some day, so the second word of the file is when the process was started.
started_at() {
    local fields
    fields="$(sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null)" || return 1
    [ "${fields%% *}" != Z ] || return 1
    cut -d ' ' -f 20 <<<"$fields"
}

is_running() {
    local pid start
    read -r pid start 2>/dev/null <"$folder/$1.pid" || return 1
    [ -n "$start" ] && [ "$(started_at "$pid")" = "$start" ]
}

run_daemon() {
    local name="$1" pid
    shift
    # In a session of its own: what the caller's terminal or group receives is not for it.
    setsid "$@" </dev/null >>"$folder/$name.log" 2>&1 &
    pid=$!
    disown "$pid"
    printf '%s %s\n' "$pid" "$(started_at "$pid" || true)" >"$folder/$name.pid"
}

# A port that nobody listens on, below those that tandem and the system choose themselves.
free_port() {
    local port
    for _ in {1..100}; do
        port=$((10000 + RANDOM % 10000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            printf '%s\n' "$port"
            return
        fi
    done
    fail 1 "no free port was found between 10000 and 19999 in 100 attempts"
}

# Why the start failed, with the end of every log.
explain() {
    local log
    say "$1"
    for log in "$folder"/*.log; do
        if [ -s "$log" ]; then
            say "the end of $(basename "$log"):"
            tail -n 15 "$log" >&2
        fi
    done
}

find_program() {
    PATH="$PATH:/usr/sbin:/sbin" command -v "$1" || fail 1 "'$1' is missing; on Debian and Ubuntu: apt-get install slurm-wlm munge"
}

write_configuration() {
    local host controller_port node_port first_job
    host="$(hostname -s)"
    controller_port="$(free_port)"
    node_port="$(free_port)"
    while [ "$node_port" = "$controller_port" ]; do
        node_port="$(free_port)"
    done
    # tandem's ranks meet at a port made from the job's number, which is to differ between two of these on one machine.
    first_job="FirstJobId=$((1 + RANDOM))"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=tandem
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.own_pid
SlurmdPidFile=$folder/slurmd.own_pid
MailProg=/bin/true
$first_job
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$num_cpus State=UNKNOWN
PartitionName=local Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    # No control groups: newer versions have a word for that, older ones use none under v1 as long as nothing asks for one.
    local plugin=cgroup/v1
    if [[ "$("$slurmd" -V | cut -d ' ' -f 2)" > 23. ]]; then
        plugin=disabled
    fi
    printf 'CgroupPlugin=%s\n' "$plugin" >"$folder/cgroup.conf"
}

wait_for() {
    local what="$1" daemon
    shift
    while ! "$@" >/dev/null 2>&1; do
        for daemon in "${daemons[@]}"; do
            if [ -e "$folder/$daemon.pid" ] && ! is_running "$daemon"; then
                explain "$daemon ended before $what"
                return 1
            fi
        done
        if [ "$SECONDS" -ge "$num_seconds_at_most" ]; then
            explain "waited $seconds_to_start s in vain for this: $what"
            return 1
        fi
        sleep 0.1
    done
}

is_idle() {
    [ "$(timeout 5 sinfo --noheader --format=%t)" = idle ]
}

start() {
    local munged slurmctld slurmd
    [[ "$folder" =~ ^[A-Za-z0-9._/-]+$ ]] || fail 2 "slurm.conf cannot hold the path '$folder'; use letters, digits and ._- alone"
    [ "${#folder}" -le 60 ] || fail 2 "the path '$folder' has ${#folder} characters, but sockets leave room for 60; give a shorter FOLDER"
    munged="$(find_program munged)"
    slurmctld="$(find_program slurmctld)"
    slurmd="$(find_program slurmd)"
    find_program sinfo >/dev/null
    mkdir "$folder" 2>/dev/null || fail 2 "the folder '$folder' could not be made, or is there already; give the path of a new one"
    trap 'stop || true' EXIT
    mkdir "$folder/state" "$folder/spool"
    head -c 128 /dev/urandom >"$folder/munge.key"
    write_configuration
    export SLURM_CONF="$folder/slurm.conf"
    num_seconds_at_most=$((SECONDS + seconds_to_start))

    # --force: munged wants a socket that every user can reach, while this one is for its owner alone.
    run_daemon munged "$munged" --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
        --seed-file="$folder/munge.seed" --pid-file="$folder/munged.own_pid" --num-threads=2
    wait_for "munged's socket is there" test -S "$folder/munge.socket"
    run_daemon slurmctld "$slurmctld" -D
    run_daemon slurmd "$slurmd" -D
    wait_for "the node is idle" is_idle
    trap - EXIT
    say "the node $(hostname -s) with $num_cpus CPUs is idle; end it with: $0 stop $folder"
    printf 'export SLURM_CONF=%q\n' "$folder/slurm.conf"
}

is_ours() {
    [ -f "$folder/slurm.conf" ] && [ -f "$folder/munge.key" ]
}

stop_daemon() {
    local pid signal
    for signal in TERM KILL; do
        local deadline=$((SECONDS + seconds_to_stop))
        while is_running "$1"; do
            read -r pid _ <"$folder/$1.pid"
            [ "$SECONDS" -lt "$deadline" ] || break
            [ "$signal" = "" ] || kill -"$signal" "$pid" 2>/dev/null || true
            signal=""
            sleep 0.05
        done
    done
}

stop() {
    local daemon
    is_ours || fail 2 "'$folder' holds no Slurm that this script started; nothing was stopped"
    if is_running slurmctld && is_running slurmd; then
        # Jobs would outlive slurmd.
        export SLURM_CONF="$folder/slurm.conf"
        timeout 5 scancel --user="$(id -un)" || true
        local deadline=$((SECONDS + seconds_to_stop))
        while [ -n "$(timeout 5 squeue --noheader)" ] && [ "$SECONDS" -lt "$deadline" ]; do
            sleep 0.1
        done
    fi
    for daemon in "${daemons[@]}"; do
        stop_daemon "$daemon"
    done
    rm -rf "$folder"
}

status() {
    local daemon code=0
    is_ours || fail 1 "'$folder' holds no Slurm that this script started"
    for daemon in "${daemons[@]}"; do
        if is_running "$daemon"; then
            say "$daemon runs"
        else
            say "$daemon does not run"
            code=1
        fi
    done
    if [ "$code" -eq 0 ]; then
        SLURM_CONF="$folder/slurm.conf" timeout 5 sinfo >&2 || code=1
    fi
    return "$code"
}

case "${1-}" in
    -h | --help)
        usage
        exit 0
        ;;
    start | stop | status) ;;
    *) fail 2 "the first word must be start, stop or status, not '${1-}'" ;;
esac
if [ "$#" -ne 2 ] || [ -z "$2" ]; then
    usage >&2
    exit 2
fi
folder="$(realpath -m -- "$2")"
"$1"
