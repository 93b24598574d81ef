#!/bin/bash
# A real Slurm cluster of four nodes with eight mock GPUs each, two of them in the default partition. It runs for as long
# as standard input stays open, and is started as
#   unshare --mount --uts --net --pid --fork --kill-child --mount-proc cluster.sh FOLDER
# so that its ports and addresses are isolated, and so that the kernel ends all of it with this script.
# A node is a slurmd with its own host name and network, so "localhost" is different on each, as on a real cluster.
set -eu
folder=$1 # short: it holds unix sockets
export SLURM_CONF=$folder/slurm.conf
net=10.99.77

mkdir "$folder"/{state,log,gpu}
for gpu in {0..7}; do mknod "$folder/gpu/mock$gpu" c 1 3; done # like /dev/null, since Slurm requires a device
echo "Name=gpu File=$folder/gpu/mock[0-7]" > "$folder/gres.conf"
echo "CgroupPlugin=cgroup/v1" > "$folder/cgroup.conf" # not used; without this line slurmd looks for one
# cred_expire: how long a requeued job waits. GraceTime: how long before their end preempted tasks get SIGTERM.
cat > "$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=ctl($net.254)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd.%n
SlurmdParameters=config_overrides
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
MinJobAge=3600
NodeName=node[1-4] NodeAddr=$net.[1-4] CPUs=96 RealMemory=262144 Gres=gpu:8
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=30
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE PriorityTier=10
PartitionName=wide Nodes=node[1-4] MaxTime=INFINITE PriorityTier=1
C

hostname ctl
printf '%s\n' "127.0.0.1 localhost" "$net.254 ctl" > "$folder/hosts"
for number in {1..4}; do echo "$net.$number node$number" >> "$folder/hosts"; done
mount --bind "$folder/hosts" /etc/hosts
mkdir -p /run/netns
mount -t tmpfs none /run/netns
ip link set lo up
ip link add bridge type bridge
ip address add $net.254/24 dev bridge
ip link set bridge up

head -c 128 /dev/urandom > "$folder/munge.key"
chmod 400 "$folder/munge.key"
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --log-file="$folder/log/munged" --seed-file="$folder/munge.seed"
slurmctld
for number in {1..4}; do
    node=node$number
    ip netns add $node
    ip link add veth$number type veth peer name eth0 netns $node
    ip link set veth$number master bridge up
    ip -n $node address add $net.$number/24 dev eth0
    ip -n $node link set eth0 up
    ip -n $node link set lo up
    # Not 'ip netns exec': it hides /sys/fs/cgroup, without which slurmd does not start.
    nsenter --net=/run/netns/$node unshare --uts bash -c "hostname $node && exec slurmd"
done
until [ "$(sinfo -h -p wide -o '%t %D')" = "idle 4" ]; do sleep 0.1; done
echo ready
cat > /dev/null
