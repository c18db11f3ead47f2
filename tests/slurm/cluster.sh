#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, in a folder of its own, with ports and keys of its own; as root.
#   tests/slurm/cluster.sh up DIR        then: export SLURM_CONF=DIR/slurm.conf; sinfo
#   tests/slurm/cluster.sh down DIR
# Debian: apt-get install -y slurm-wlm munge
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
dir=$(realpath -m "$2")
host=$(hostname -s)

stop() {
    local pid
    for name in slurmctld slurmd munged; do
        [ -s "$dir/$name.pid" ] || continue
        pid=$(cat "$dir/$name.pid")
        kill "$pid" 2> /dev/null || continue
        for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2> /dev/null || true
    done
}

case $1 in
    down)
        stop
        exit 0
        ;;
    up) ;;
    *)
        echo "usage: cluster.sh up|down DIR" >&2
        exit 2
        ;;
esac

mkdir -p "$dir/state" "$dir/spool"
chmod 755 "$dir"
ports() {
    python3 -c 'import socket
s = [socket.socket() for _ in range(2)]
[x.bind(("127.0.0.1", 0)) for x in s]
print(*(x.getsockname()[1] for x in s))'
}
read -r control daemon < <(ports)

# gpu: counted, not there; so that the options for GPU nodes mean something.
cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$control
SlurmdPort=$daemon
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CredType=cred/munge
MpiDefault=none
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmctldDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=20
# A job that has ended stays known, so that the test can ask for its state.
MinJobAge=3600
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
touch "$dir"/gpu{0,1,2,3}
echo "NodeName=$host Name=gpu File=$dir/gpu[0-3]" > "$dir/gres.conf"
head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"

munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed" --num-threads=2 2> "$dir/munged.err"
export SLURM_CONF=$dir/slurm.conf
slurmctld -f "$SLURM_CONF" 2> "$dir/slurmctld.err"
slurmd -f "$SLURM_CONF" 2> "$dir/slurmd.err"
for _ in $(seq 200); do
    case $(sinfo -h -o %T 2> /dev/null || true) in idle*) exit 0 ;; esac
    sleep 0.1
done
echo "error: the node did not come up; the last lines of $dir/*.log:" >&2
tail -n 5 "$dir"/*.log >&2
stop
exit 1
